"""The send buffer of a Ulysses all-to-all, packed in one pass, in fp8 if wanted.

Chunk r of the buffer is what rank r gets: the rows (a row is one head of one token, D numbers) of
its heads, or of its part of the sequence, ordered by sample, token and head. In fp8 (`e4m3`: uint8
codes and a float32 scale per row) a chunk is bytes, each section a multiple of 16 of them:

    codes (B, S, H, D) | zeros | scales (B, S, H) | zeros

That is D + 4 bytes per row, where bfloat16 has 2 * D. Each byte of the tensor and of the message
moves once, in one launch. The layout alone is bound by memory bandwidth; with fp8, the integer
arithmetic of the conversion counts too.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common import e4m3
from dbcache.kernels.common.e4m3 import decode, is_native, quantize_rows
from dbcache.kernels.common.launches import cdiv, power_of_2
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import DTYPES, Impl, invalid, without_gradient

Split = Literal["heads", "sequence"]

BLOCK = 4096


def fp8_pack(
    x: Tensor, *, world: int, scatter: Split, quantize: bool = True, impl: Impl = "auto"
) -> Tensor:
    """Return the send buffer of an all-to-all over `world` ranks that scatters a dimension of `x`.

    In fp8 an element is off by at most 1/16 of itself or 1/1024 of its row's scale, whichever is
    larger; rows of zeros stay zeros. An element that is not finite becomes NaN, without touching
    the rest of its row.

    Args:
        x: (B, S, H, D), float32, float16 or bfloat16. Any strides; copied first where D is not
            contiguous.
        world: number of ranks; divides the dimension that is scattered.
        scatter: ``"heads"`` before attention, where `x` has this rank's tokens and all heads;
            ``"sequence"`` after it, where `x` has all tokens and this rank's heads.
        quantize: False to change the layout only.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    Returns:
        A new contiguous buffer of one row per rank: uint8 (world, bytes), where bytes is a
        multiple of 16, or (world, numel / world) in the dtype of `x` without quantisation. No
        gradient, no synchronisation.

    Raises:
        ValueError: the shape, the dtype or `scatter` does not fit.
    """
    _check_split("fp8_pack", "scatter", scatter, x.shape, world)
    if x.dtype not in DTYPES:
        raise invalid("fp8_pack", f"x must have a dtype of {DTYPES}", x.dtype)
    return _fp8_pack(impl, x, world, scatter, quantize)


def fp8_unpack(
    buffer: Tensor,
    shape: Sequence[int],
    *,
    gather: Split,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the tensor from the buffer that an all-to-all of packed buffers received.

    Args:
        buffer: what was received, one row per rank: uint8 with values and scales, or a layout
            without quantisation; contiguous.
        shape: of the result, (B, S, H, D).
        gather: the dimension of which each rank sent a part: ``"sequence"`` before attention
            (the ranks scattered heads), ``"heads"`` after it (they scattered the sequence).
        dtype: of the result, float32, float16 or bfloat16; None for bfloat16 if quantised, else
            the buffer's.
        impl: as of `fp8_pack`.

    Returns:
        A new contiguous tensor of that shape, ``value * scale`` in float32 rounded once. No
        gradient, no synchronisation.

    Raises:
        ValueError: the buffer's shape or dtype, `shape`, `dtype` or `gather` does not fit.
    """
    quantized = buffer.dtype == torch.uint8
    if dtype is None:
        dtype = torch.bfloat16 if quantized else buffer.dtype
    if buffer.ndim != 2 or not buffer.is_contiguous():
        must = "the buffer must be (world, size) and contiguous"
        raise invalid("fp8_unpack", must, tuple(buffer.shape), buffer.stride())
    world = buffer.shape[0]
    _check_split("fp8_unpack", "gather", gather, shape, world)
    if not (quantized or buffer.dtype in DTYPES) or dtype not in DTYPES:
        must = f"the buffer must be uint8 or of {DTYPES}, and dtype one of the latter"
        raise invalid("fp8_unpack", must, buffer.dtype, dtype)
    rows, width = math.prod(shape[:3]) // world, shape[3]
    size = sections(rows, width)[1] if quantized else rows * width
    if buffer.shape[1] != size:
        must = f"a buffer of {tuple(shape)} from {world} ranks must be {(world, size)}"
        raise invalid("fp8_unpack", must, tuple(buffer.shape))
    return _fp8_unpack(impl, buffer, list(shape), gather, dtype)


@without_gradient
def fp8_pack_reference(x: Tensor, world: int, scatter: str, quantize: bool = True) -> Tensor:
    """Plain PyTorch, the meaning of `fp8_pack`."""
    values, buffer = _by_rank(x, world, scatter), _allocate(x, world, quantize)
    if quantize:
        values, scales = e4m3.quantize(values.float())
        _scales(buffer, values.shape).copy_(scales)
    _values(buffer, values.shape).copy_(values)
    return buffer


@without_gradient
def fp8_unpack_reference(
    buffer: Tensor, shape: Sequence[int], gather: str, dtype: torch.dtype
) -> Tensor:
    """Plain PyTorch, the meaning of `fp8_unpack`."""
    out = torch.empty(list(shape), dtype=dtype, device=buffer.device)
    chunks = _by_rank(out, buffer.shape[0], gather)
    values = _values(buffer, chunks.shape)
    if buffer.dtype == torch.uint8:
        values = e4m3.dequantize(values, _scales(buffer, chunks.shape))
    chunks.copy_(values)
    return out


def _by_rank(x: Tensor, world: int, split: str) -> Tensor:
    """View (B, S, H, D) as (world, B, S, H, D) with the ranks' parts of a dimension apart."""
    dim = 2 if split == "heads" else 1
    return x.unflatten(dim, (world, x.shape[dim] // world)).movedim(dim, 0)


def sections(rows: int, width: int) -> tuple[int, int]:
    """Return the byte offsets of a chunk's scales and of its end, multiples of 16."""
    start = (rows * width + 15) // 16 * 16
    return start, start + (rows * 4 + 15) // 16 * 16


def _allocate(x: Tensor, world: int, quantize: bool) -> Tensor:
    rows, width = math.prod(x.shape[:3]) // world, x.shape[3]
    if not quantize:
        return x.new_empty((world, rows * width))
    size = sections(rows, width)[1]
    # without padding every byte is written
    allocate = x.new_empty if size == rows * (width + 4) else x.new_zeros
    return allocate((world, size), dtype=torch.uint8)


def _values(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """View the codes or elements of all chunks, of `shape` (world, B, S, H, D)."""
    return buffer[:, : math.prod(shape[1:])].unflatten(1, list(shape[1:]))


def _scales(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """View the scales' section of all chunks, of `shape` (world, B, S, H, D) without D."""
    if buffer.storage_offset() % 4:  # not in `fp8_unpack`: torch.compile cannot trace it
        must = "the buffer must start at a multiple of 4 bytes, for the scales"
        raise invalid("fp8_unpack", must, buffer.storage_offset())
    rows = math.prod(shape[1:4])
    start, end = sections(rows, shape[4])
    words = buffer.flatten().view(torch.float32).view(shape[0], end // 4)
    return words[:, start // 4 : start // 4 + rows].unflatten(1, list(shape[1:4]))


def _check_split(op: str, name: str, split: str, shape: Sequence[int], world: int) -> None:
    if split not in get_args(Split):
        raise invalid(op, f"{name} must be one of {get_args(Split)}", repr(split))
    if len(shape) != 4 or shape[3] < 1:
        raise invalid(op, "the shape must be (B, S, H, D) with D >= 1", tuple(shape))
    size = shape[2 if split == "heads" else 1]
    if world < 1 or size % world:
        must = f"the {split} must be divisible by the number of ranks"
        raise invalid(op, must, size, world)


def _launch(x: Tensor, buffer: Tensor, split: str, pack: bool) -> None:
    """Pack a tensor (B, S, H, D) whose D is contiguous into a buffer, or unpack it from there."""
    if x.numel() == 0:
        return
    world = buffer.shape[0]
    chunks = _by_rank(x, world, split)
    _, batch, tokens, heads, width = chunks.shape
    scales = _scales(buffer, chunks.shape) if buffer.dtype == torch.uint8 else None
    strides = chunks.stride()[:4]
    block_d = power_of_2(width)
    block_rows = max(1, BLOCK // block_d)
    _fp8_kernel[(cdiv(tokens * heads, block_rows), batch, world)](
        x, buffer, scales, tokens * heads, heads, *strides, buffer.stride(0),
        buffer.stride(0) // 4, D=width, ALIGN=math.gcd(16, *strides), PACK=pack,
        NATIVE=is_native(x.device), BLOCK_ROWS=block_rows, BLOCK_D=block_d,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _fake_pack(x, world, scatter, quantize, impl):
    return _allocate(x, world, quantize)


@op(fp8_pack_reference, like="x", fake=_fake_pack)
def _fp8_pack(x, world, scatter, quantize):
    buffer = _allocate(x, world, quantize)
    _launch(x if x.stride(3) == 1 else x.contiguous(), buffer, scatter, pack=True)
    return buffer


def _fake_unpack(buffer, shape, gather, dtype, impl):
    return buffer.new_empty(list(shape), dtype=dtype)


@op(fp8_unpack_reference, like="buffer", fake=_fake_unpack)
def _fp8_unpack(buffer, shape, gather, dtype):
    out = torch.empty(list(shape), dtype=dtype, device=buffer.device)
    _launch(out, buffer, gather, pack=False)
    return out


@triton.jit(do_not_specialize=["rows", "heads", "scales_size"])
def _fp8_kernel(
    x_ptr, buffer_ptr, scales_ptr, rows, heads, stride_w, stride_b, stride_s, stride_h,
    chunk_size, scales_size,
    D: tl.constexpr, ALIGN: tl.constexpr, PACK: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program packs, or unpacks, `BLOCK_ROWS` of the `rows` of one sample of one rank.

    The strides of x, of rank, sample, token and head, are multiples of `ALIGN`, which lets the
    compiler widen the loads and stores.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    batch = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2).to(tl.int64)
    s = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    offsets = chunk * stride_w + batch * stride_b + s * stride_s + h * stride_h
    packed_row = batch * rows + row
    offsets = tl.multiple_of(offsets, ALIGN)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows)[:, None] & (d < D)
    packed_ptrs = buffer_ptr + chunk * chunk_size + (packed_row * D)[:, None] + d
    if PACK:
        x = tl.load(x_ptr + offsets + d, mask=mask, other=0.0)
        if scales_ptr is None:
            tl.store(packed_ptrs, x, mask=mask)
        else:
            codes, scales = quantize_rows(x.to(tl.float32), NATIVE)
            tl.store(packed_ptrs, codes, mask=mask)
            tl.store(scales_ptr + chunk * scales_size + packed_row, scales, mask=row < rows)
    else:
        x = tl.load(packed_ptrs, mask=mask, other=0)
        if scales_ptr is not None:
            scale_ptrs = scales_ptr + chunk * scales_size + packed_row
            x = decode(x, NATIVE) * tl.load(scale_ptrs, mask=row < rows, other=0.0)[:, None]
        tl.store(x_ptr + offsets + d, x.to(x_ptr.dtype.element_ty), mask=mask)
