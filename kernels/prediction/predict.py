"""The output of the skipped blocks, predicted as a weighted sum over the ring of residuals.

    out = h + sum_j weights[j] * ring[j]       (replace: without h)

One launch for hidden and encoder states. It reads h and those slots whose weight is not 0, and
writes out, so the kernel is bound by memory bandwidth. A ring may hold fp8 (`e4m3`), which is
read in the same pass, with one scale per token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.checks import check_tensor
from dbcache.kernels.common.e4m3 import decode, dequantize, tiles
from dbcache.kernels.common.launches import BLOCK, contiguous, elementwise, power_of_2
from dbcache.kernels.common.op import op
from dbcache.kernels.common.plans import REFERENCE, Plan, Plans
from dbcache.kernels.common.select import Impl, without_gradient
from dbcache.kernels.prediction.ring import check_rings

MAX_COLUMNS = 512
"""Widest tile of fp8 tokens; widths of models are multiples of it, or nearly."""


def predict(
    h: Tensor,
    ring: Tensor,
    weights: Tensor,
    encoder: Tensor | None = None,
    encoder_ring: Tensor | None = None,
    encoder_weights: Tensor | None = None,
    scales: Tensor | None = None,
    encoder_scales: Tensor | None = None,
    *,
    out: Tensor | None = None,
    encoder_out: Tensor | None = None,
    replace: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return ``h + sum_j weights[j] * ring[j]``, and the same for the encoder states.

    The sum is float32, rounded once to the dtype of `h`. A slot whose weight is exactly 0 does not
    contribute, whatever it holds; it may be uninitialised.

    Args:
        h: activations before the skipped blocks, any shape, float32, float16 or bfloat16. Any
            strides; copied first where not contiguous.
        ring: (K, *h.shape), contiguous, 1 <= K <= MAX_SLOTS, one of the dtypes, or uint8 for fp8.
        weights: float32 (MAX_SLOTS,), the first K are used.
        encoder: second stream, as `h`, of any size of its own; its ring and weights come with it.
        encoder_ring: as `ring`, with the same K; `encoder_weights` as `weights`.
        scales: of an fp8 ring, as `commit` left them, float32 (K, *h.shape[:-1]), contiguous.
        encoder_scales: as `scales`, for `encoder_ring`: both rings are fp8, or none.
        out: written instead of a new tensor: shape, dtype and device of `h`, contiguous. It may
            be `h` itself; it must not overlap the rest. `encoder_out` is that of `encoder`.
        replace: leave `h` out of the sum, for rings that hold outputs rather than residuals.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    Returns:
        Contiguous tensors (those given, else new ones), None for a stream that was not given. No
        gradient. The reference synchronises if the weights are on a GPU; Triton does not.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    moving = [h, encoder]
    kept = [ring, weights, encoder_ring, encoder_weights, scales, encoder_scales]
    found = LAUNCHES.find(impl, replace, moving, kept)
    if found is None:
        check_predict("predict", moving, kept)
        found = LAUNCHES.note_checked(impl, replace, moving, kept)
    out = torch.empty_like(h) if out is None and h.is_contiguous() else _output("h", h, out)
    if encoder is None:
        encoder_out = None
    elif encoder_out is None and encoder.is_contiguous():
        encoder_out = torch.empty_like(encoder)
    else:
        encoder_out = _output("encoder", encoder, encoder_out)
    if found is REFERENCE:
        predict_reference(out, encoder_out, moving, kept, replace)
    elif type(found) is not tuple or not _follow(*found, out, encoder_out):
        _predict(impl, out, encoder_out, moving, kept, replace)
    return out, encoder_out


def check_predict(op, moving, kept):
    """Raise a ValueError, as from `op`, unless the tensors of `predict` fit."""
    h, encoder = moving
    ring, weights, encoder_ring, encoder_weights, scales, encoder_scales = kept
    streams = [("h", h, ring, scales, weights)]
    if encoder is not None:
        if encoder_ring is None or encoder_weights is None:
            raise ValueError(f"{op}: encoder must come with its ring and weights, got None")
        streams.append(("encoder", encoder, encoder_ring, encoder_scales, encoder_weights))
    check_rings(op, *streams)


def _output(name: str, x: Tensor, out: Tensor | None) -> Tensor:
    """Return `out` if it fits `x`, or a new contiguous tensor for None."""
    if out is None:
        return x.new_empty(x.shape)
    form = (x.dtype, x.shape, x.device)
    check_tensor("predict", f"the output for {name}", out, *form, contiguous=True)
    return out


def _follow(
    plan: Plan, addresses: Sequence[int | None], out: Tensor, encoder_out: Tensor | None
) -> bool:
    """Launch what `plan` says, unless an output is not aligned as at first."""
    address, encoder_address = out.data_ptr(), 0 if encoder_out is None else encoder_out.data_ptr()
    if (address | encoder_address) & 15:
        return False
    plan.launch(address, encoder_address or None, *addresses)
    return True


Tensors = list[Tensor | None]


@without_gradient
def predict_reference(
    out: Tensor, encoder_out: Tensor | None, moving: Tensors, kept: Tensors, replace: bool
) -> None:
    """Plain PyTorch, the meaning of `predict`; `moving` and `kept` as it has them."""
    ring, weights, encoder_ring, encoder_weights, scales, encoder_scales = kept
    _write_sum(out, moving[0], ring, weights, scales, replace)
    if encoder_out is not None:
        _write_sum(encoder_out, moving[1], encoder_ring, encoder_weights, encoder_scales, replace)


def _write_sum(out, h, ring, weights, scales, replace):
    """Add up in float32, one op per used slot; h first, so that it needs no pass of its own."""
    into = out if out.dtype is torch.float32 else None
    total = None if replace else h.float()
    for slot, weight in enumerate(weights.tolist()[: len(ring)]):
        if weight != 0:
            snapshot = ring[slot] if scales is None else dequantize(ring[slot], scales[slot])
            if total is None:
                total = torch.mul(snapshot.float(), weight, out=into)
            else:
                total = torch.add(total, snapshot, alpha=weight, out=into)
    if total is None:
        out.zero_()
    elif total is not out:
        out.copy_(total)


def fp8_tile(width: int, itemsize: int) -> tuple[int, int, int]:
    """Return rows (tokens) and columns of a program's tile, BLOCK elements, and its warps."""
    columns = min(power_of_2(max(width, 16)), MAX_COLUMNS)
    # of float32, 16 elements per thread spill
    return BLOCK // columns, columns, 8 if itemsize == 4 else 4


LAUNCHES = Plans()


@op(predict_reference, like="moving", mutates=("out", "encoder_out"))
def _predict(out, encoder_out, moving, kept, replace):
    h, encoder = contiguous(*moving)
    ring, *_, scales, _ = kept
    if scales is None:
        sizes = elementwise("predict", h, encoder, ring.shape[0])
        kernel, (parts, tail, warps) = _predict_kernel, sizes
    else:
        kernel, (parts, tail, warps) = _predict_fp8_kernel, tiles(h, encoder, fp8_tile)
    if not parts:
        return
    tail |= {"K": ring.shape[0], "REPLACE": replace}
    LAUNCHES.launch(
        replace, moving, kept, kernel, (parts,), (out, encoder_out, h, encoder), kept, tail,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


class Stream(NamedTuple):
    """The tensors of the hidden or the encoder states, in a kernel; see `predict`."""

    h_ptr: Any
    ring_ptr: Any
    weights_ptr: Any
    out_ptr: Any


@triton.jit(do_not_specialize=["blocks"])
def _predict_kernel(
    out_ptr, encoder_out_ptr, h_ptr, encoder_ptr, ring_ptr, weights_ptr,
    encoder_ring_ptr, encoder_weights_ptr, scales_ptr, encoder_scales_ptr,
    size, blocks, encoder_size, BLOCK: tl.constexpr, K: tl.constexpr, REPLACE: tl.constexpr,
):  # fmt: skip
    """The first `blocks` programs take the hidden states, the others the encoder states."""
    block = tl.program_id(0)
    if encoder_ptr is None or block < blocks:
        stream = Stream(h_ptr, ring_ptr, weights_ptr, out_ptr)
        predict_block(stream, size, block, K, REPLACE, BLOCK)
    else:
        encoder = Stream(encoder_ptr, encoder_ring_ptr, encoder_weights_ptr, encoder_out_ptr)
        predict_block(encoder, encoder_size, block - blocks, K, REPLACE, BLOCK)


@triton.jit
def predict_block(stream, size, block, K: tl.constexpr, REPLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Predict block `block` of a stream of `size` elements."""
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        weight = tl.load(stream.weights_ptr + slot)
        # a slot of weight 0 is not read: it saves the bytes, and it may hold anything
        used = offsets < tl.where(weight != 0.0, size, 0)
        slot_ptr = stream.ring_ptr + tl.cast(size, tl.int64) * slot
        total += weight * tl.load(slot_ptr + offsets, mask=used, other=0.0).to(tl.float32)
    if not REPLACE:
        total += tl.load(stream.h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(stream.out_ptr + offsets, total.to(stream.out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "blocks", "encoder_tokens"])
def _predict_fp8_kernel(
    out_ptr, encoder_out_ptr, h_ptr, encoder_ptr, ring_ptr, weights_ptr,
    encoder_ring_ptr, encoder_weights_ptr, scales_ptr, encoder_scales_ptr,
    tokens, width, blocks, encoder_tokens, encoder_width, NATIVE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, REPLACE: tl.constexpr,
):  # fmt: skip
    """As `_predict_kernel`, with a tile of tokens per program."""
    block = tl.program_id(0)
    if encoder_ptr is None or block < blocks:
        stream = Stream(h_ptr, ring_ptr, weights_ptr, out_ptr)
        _predict_tile(stream, scales_ptr, tokens, width, block, K, REPLACE, NATIVE, ROWS, COLUMNS)
    else:
        encoder = Stream(encoder_ptr, encoder_ring_ptr, encoder_weights_ptr, encoder_out_ptr)
        _predict_tile(
            encoder, encoder_scales_ptr, encoder_tokens, encoder_width, block - blocks,
            K, REPLACE, NATIVE, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _predict_tile(
    stream, scales_ptr, tokens, width, block,
    K: tl.constexpr, REPLACE: tl.constexpr, NATIVE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, COLUMNS)  # per row of tiles
    rows = (block // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (block % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = rows[:, None] * width + columns[None, :]
    mask = (rows < tokens)[:, None] & (columns < width)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for slot in tl.static_range(K):
        weight = tl.load(stream.weights_ptr + slot)
        # a slot of weight 0 is not read: it saves the bytes, and it may hold anything
        end = tl.where(weight != 0.0, tokens, 0)
        used = (rows < end)[:, None] & (columns < width)[None, :]
        slot_ptr = stream.ring_ptr + tl.cast(tokens, tl.int64) * width * slot
        codes = tl.load(slot_ptr + offsets, mask=used, other=0)
        slot_scales_ptr = scales_ptr + tl.cast(tokens, tl.int64) * slot
        scales = tl.load(slot_scales_ptr + rows, mask=rows < end, other=0.0)
        total += (weight * scales)[:, None] * decode(codes, NATIVE)
    if not REPLACE:
        total += tl.load(stream.h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(stream.out_ptr + offsets, total.to(stream.out_ptr.dtype.element_ty), mask=mask)
