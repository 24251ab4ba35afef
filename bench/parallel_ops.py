"""The ops around attention across GPUs, as rows of the kernel benchmark.

The tensors are those of one rank of WORLD: hidden and encoder tokens in one sequence, (B, S, H, D)
with heads of 128. Merging partial attentions is compared with the form that
github.com/zhuzilin/ring-flash-attention publishes, in float32; packing with what its steps are in
PyTorch: change the layout, find the largest element of each row, divide, cast, concatenate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.kernel_op import Draw, Inputs, KernelOp, Outputs
from bench.shapes import DTYPES, Shape
from dbcache.kernels.common.select import Backend
from dbcache.kernels.distributed.fp8_pack import fp8_pack, fp8_unpack
from dbcache.kernels.distributed.merge_attention import merge_attention

WORLD = 4
HEAD_WIDTH = 128
LARGEST = 448.0
"""Largest e4m3 number."""


def size_of(shape: Shape) -> tuple[int, int, int, int]:
    """Return (B, S, H, D) of one rank's queries; widths that no model has get WORLD heads."""
    tokens = max(1, (shape.hidden + shape.encoder) // WORLD)
    heads = shape.width // HEAD_WIDTH
    if heads * HEAD_WIDTH != shape.width or heads % WORLD:
        heads = WORLD
    return shape.batch, tokens, heads, max(1, shape.width // heads)


def _rows_and_elements(shape: Shape) -> tuple[int, int]:
    """Return the heads of all tokens, and the numbers in them."""
    batch, tokens, heads, width = size_of(shape)
    return batch * tokens * heads, batch * tokens * heads * width


# -- merging partial attentions


def _make_merge(shape: Shape, draw: Draw) -> Inputs:
    size = size_of(shape)
    return {
        "out_a": draw.normal(*size, dtype=torch.float32),
        "lse_a": draw.normal(*size[:3], dtype=torch.float32),
        "out_b": draw.normal(*size, dtype=DTYPES[shape.dtype]),
        "lse_b": draw.normal(*size[:3], dtype=torch.float32),
    }


def _merge(x: Inputs, impl: Backend) -> Outputs:
    return merge_attention(x["out_a"], x["lse_a"], x["out_b"], x["lse_b"], impl=impl)


def _merge_eager(x: Inputs) -> Outputs:
    out_b, change = x["out_b"].float(), x["lse_b"] - x["lse_a"]
    out = x["out_a"] - torch.sigmoid(change).unsqueeze(-1) * (x["out_a"] - out_b)
    return out, x["lse_a"] - F.logsigmoid(-change)


def _merge_bytes(shape: Shape) -> int:
    rows, elements = _rows_and_elements(shape)
    # the running output is float32, read and written; so are three log-sum-exp
    return elements * (4 + 4 + DTYPES[shape.dtype].itemsize) + rows * 3 * 4


# -- packing for an all-to-all


def _make_pack(shape: Shape, draw: Draw) -> Inputs:
    return {"x": draw.normal(*size_of(shape), dtype=DTYPES[shape.dtype])}


def _by_rank(x: torch.Tensor) -> torch.Tensor:
    """View (B, S, H, D) as (WORLD, B, S, H / WORLD, D)."""
    return x.unflatten(2, (WORLD, -1)).movedim(2, 0)


def _pack(x: Inputs, impl: Backend) -> Outputs:
    return (fp8_pack(x["x"], world=WORLD, scatter="heads", impl=impl),)


def _pack_eager(x: Inputs) -> Outputs:
    chunks = _by_rank(x["x"]).contiguous().float()
    scales = chunks.abs().amax(-1, keepdim=True) / LARGEST
    codes = (chunks / scales).to(torch.float8_e4m3fn).view(torch.uint8)
    return (torch.cat((codes.flatten(1), scales.flatten(1).view(torch.uint8)), 1),)


def _unpacked(alignment: int, x: Inputs, outputs: Outputs) -> Outputs:
    """Return the numbers that a packed buffer stands for, its sections aligned to some bytes."""
    (buffer,) = outputs
    assert isinstance(buffer, torch.Tensor)
    shape = _by_rank(x["x"]).shape
    size = shape[1:].numel()
    start = -(-size // alignment) * alignment
    codes = buffer[:, :size].reshape(shape).view(torch.float8_e4m3fn).float()
    scales = buffer[:, start : start + 4 * (size // shape[-1])].contiguous().view(torch.float32)
    return (codes * scales.reshape(*shape[:-1], 1),)


def _packed_results(x: Inputs, outputs: Outputs) -> Outputs:
    return _unpacked(16, x, outputs)


def _packed_eager_results(x: Inputs, outputs: Outputs) -> Outputs:
    return _unpacked(1, x, outputs)


def _make_unpack(shape: Shape, draw: Draw) -> Inputs:
    """Return what all ranks sent, as `fp8_pack` makes it and as codes and scales apart."""
    x = _make_pack(shape, draw)["x"]
    batch, tokens, heads, width = x.shape
    impl: Backend = "triton" if x.is_cuda else "reference"
    buffer = fp8_pack(x, world=WORLD, scatter="heads", impl=impl)
    chunks = _by_rank(x).float()
    scales = chunks.abs().amax(-1, keepdim=True) / LARGEST
    return {
        "buffer": buffer,
        "shape": (batch, tokens, heads, width),
        "codes": (chunks / scales).to(torch.float8_e4m3fn),
        "scales": scales,
        "dtype": x.dtype,
    }


def _unpack(x: Inputs, impl: Backend) -> Outputs:
    return (fp8_unpack(x["buffer"], x["shape"], gather="heads", dtype=x["dtype"], impl=impl),)


def _unpack_eager(x: Inputs) -> Outputs:
    chunks = (x["codes"].float() * x["scales"]).to(x["dtype"])
    return (chunks.movedim(0, 2).flatten(2, 3).contiguous(),)


def _pack_bytes(shape: Shape) -> int:
    rows, elements = _rows_and_elements(shape)
    # the tensor on one side, codes and scales on the other
    return elements * (DTYPES[shape.dtype].itemsize + 1) + rows * 4


def _layout(x: Inputs, impl: Backend) -> Outputs:
    return (fp8_pack(x["x"], world=WORLD, scatter="heads", quantize=False, impl=impl),)


def _layout_eager(x: Inputs) -> Outputs:
    return (_by_rank(x["x"]).contiguous().view(WORLD, -1),)


def _layout_bytes(shape: Shape) -> int:
    _, elements = _rows_and_elements(shape)
    return 2 * elements * DTYPES[shape.dtype].itemsize


PARALLEL_OPS = (
    KernelOp(
        name="merge_attention",
        make=_make_merge,
        call=_merge,
        eager=_merge_eager,
        moved=_merge_bytes,
    ),
    KernelOp(
        name="fp8_pack",
        make=_make_pack,
        call=_pack,
        eager=_pack_eager,
        results=_packed_results,
        eager_results=_packed_eager_results,
        moved=_pack_bytes,
    ),
    KernelOp(
        name="fp8_unpack",
        make=_make_unpack,
        call=_unpack,
        eager=_unpack_eager,
        moved=_pack_bytes,
    ),
    KernelOp(
        name="fp8_pack layout",
        make=_make_pack,
        call=_layout,
        eager=_layout_eager,
        moved=_layout_bytes,
    ),
)
