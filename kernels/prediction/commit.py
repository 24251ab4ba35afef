"""Store a full step's probe residual and a snapshot of its block residual.

    p_ref      := h_fn - h_in                  (h_in None: h_fn; p_ref None: nothing)
    ring[slot] := h_out - h_fn                 (replace: h_out)

One launch for hidden and encoder states, in place. `slot` is read on the device, from the state
that `decide` left, so the host need not know it. With scales, the ring holds fp8 (`e4m3`): half
the bytes of bfloat16. Then a program takes whole tokens, as it needs their largest element first.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.checks import check_activations, check_tensor
from dbcache.kernels.common.e4m3 import quantize, quantize_rows, tiles
from dbcache.kernels.common.lane_state import LANE, NUM_COUNTERS, SLOT
from dbcache.kernels.common.launches import BLOCK, contiguous, elementwise, power_of_2
from dbcache.kernels.common.op import op
from dbcache.kernels.common.plans import REFERENCE, Plans
from dbcache.kernels.common.select import Impl, invalid, without_gradient
from dbcache.kernels.prediction.ring import check_rings


def commit(
    h_in: Tensor | None,
    h_fn: Tensor,
    h_out: Tensor,
    p_ref: Tensor | None,
    ring: Tensor,
    counters: Tensor,
    encoder_fn: Tensor | None = None,
    encoder_out: Tensor | None = None,
    encoder_ring: Tensor | None = None,
    scales: Tensor | None = None,
    encoder_scales: Tensor | None = None,
    *,
    replace: bool = False,
    impl: Impl = "auto",
) -> None:
    """Store ``h_fn - h_in`` (or `h_fn`) in `p_ref` and ``h_out - h_fn`` in ``ring[slot]``.

    Differences are taken in float32 and rounded once, to the dtype of `p_ref` and of `ring`.

    Args:
        h_in: activations before the probe blocks, any shape, float32, float16 or bfloat16. Any
            strides; copied first where not contiguous. None stores `h_fn` itself in `p_ref`, for
            `probe_diff` without `h_in`, which compares hidden states.
        h_fn: activations between the probe blocks and the skippable ones, same shape and dtype.
        h_out: activations after the skippable blocks, same shape and dtype.
        p_ref: written, same shape, contiguous, one of the dtypes. None, with h_in None, stores
            nothing: for blocks whose decision is taken elsewhere.
        ring: (K, *h_fn.shape), contiguous, 1 <= K <= MAX_SLOTS, one of the dtypes, or uint8 for
            fp8; one slot is written.
        counters: int32 (NUM_COUNTERS,), of a `LaneState`; ``counters[SLOT]`` is below K.
        encoder_fn: second stream, as `h_fn`, of any size of its own; the next two come with it.
        encoder_out: as `h_out`.
        encoder_ring: as `ring`, with the same K.
        scales: the fp8 ring's, float32 (K, *h_fn.shape[:-1]), contiguous; one slot is written. It
            comes with a uint8 ring, whose tokens are at most `e4m3.MAX_WIDTH` long.
        encoder_scales: as `scales`, for `encoder_ring`: both rings are fp8, or none.
        replace: store `h_out` itself, for rings that hold outputs rather than residuals.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the slot on the host, which synchronises if it is on a GPU; Triton does not.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    moving = [h_fn, h_out, h_in, encoder_fn, encoder_out]
    kept = (ring, counters, p_ref, encoder_ring, scales, encoder_scales)
    found = LAUNCHES.find(impl, replace, moving, kept)
    if found is REFERENCE:
        return commit_reference(moving, *kept, replace)
    if found is not None:
        return found[0].launch(*found[1])
    check_commit("commit", moving, *kept)
    LAUNCHES.note_checked(impl, replace, moving, kept)
    return _commit(impl, moving, *kept, replace)


@without_gradient
def commit_reference(
    moving: list[Tensor | None],
    ring: Tensor,
    counters: Tensor,
    p_ref: Tensor | None,
    encoder_ring: Tensor | None,
    scales: Tensor | None,
    encoder_scales: Tensor | None,
    replace: bool,
) -> None:
    """Plain PyTorch, the meaning of `commit`; `moving` as it has them."""
    h_fn, h_out, h_in, encoder_fn, encoder_out = moving
    slot = counters.tolist()[SLOT]
    if p_ref is not None:
        _store_difference(h_fn, h_in, p_ref)
    for before, after, stored, its_scales in (
        (h_fn, h_out, ring, scales),
        (encoder_fn, encoder_out, encoder_ring, encoder_scales),
    ):
        if stored is not None and before is not None:
            its = None if its_scales is None else its_scales[slot]
            _store_difference(after, None if replace else before, stored[slot], its)


def _store_difference(a, b, out, scales=None):
    """Write ``a - b`` (None: `a`) to `out`, with `scales` as fp8."""
    if scales is not None:
        codes, token_scales = quantize(a.float() if b is None else a.float() - b.float())
        out.copy_(codes)
        scales.copy_(token_scales)
    elif b is None:
        out.copy_(a)
    elif out.dtype == a.dtype:
        torch.sub(a, b, out=out)  # PyTorch subtracts in float32 and rounds once
    else:
        out.copy_(a.float() - b.float())


def check_commit(op, moving, ring, counters, p_ref, encoder_ring, *scales):
    """Raise a ValueError, as from `op`, unless the tensors of `commit` fit."""
    h_fn, h_out, h_in, encoder_fn, encoder_out = moving
    if h_in is not None and p_ref is None:
        raise invalid(op, "h_in must come with p_ref", tuple(h_in.shape), None)
    check_activations(op, p_ref, h_in=h_in, h_fn=h_fn, h_out=h_out)
    check_tensor(op, "counters", counters, torch.int32, (NUM_COUNTERS,), h_fn.device)
    if p_ref is not None and not p_ref.is_contiguous():
        raise invalid(op, "p_ref must be contiguous", p_ref.stride())
    streams = [("h_out", h_out, ring, scales[0], None)]
    if encoder_fn is not None:
        if encoder_out is None or encoder_ring is None:
            raise ValueError(f"{op}: encoder_fn must come with its output and ring, got None")
        check_activations(op, encoder_fn=encoder_fn, encoder_out=encoder_out)
        streams.append(("encoder_out", encoder_out, encoder_ring, scales[1], None))
    check_rings(op, *streams)


def fp8_tile(width: int, itemsize: int) -> tuple[int, int, int]:
    """Return rows and columns of a program's tile of whole tokens, and its warps."""
    columns = power_of_2(max(width, 16))
    rows = max(1, BLOCK // columns)
    # 16 elements per thread, 16 bytes of codes; of float32 half as many, or registers spill
    return rows, columns, min(max(rows * columns // 512, 4) * (2 if itemsize == 4 else 1), 16)


LAUNCHES = Plans()


WRITTEN = ("p_ref", "ring", "encoder_ring", "scales", "encoder_scales")


@op(commit_reference, like="moving", mutates=WRITTEN)
def _commit(moving, ring, counters, p_ref, encoder_ring, scales, encoder_scales, replace):
    kept = (ring, counters, p_ref, encoder_ring, scales, encoder_scales)
    args = contiguous(*moving)
    h_fn, _, _, encoder_fn, _ = args
    if scales is None:
        kernel, (parts, tail, warps) = _commit_kernel, elementwise("commit", h_fn, encoder_fn)
    else:
        kernel, (parts, tail, warps) = _commit_fp8_kernel, tiles(h_fn, encoder_fn, fp8_tile)
    if parts:
        tail |= {"REPLACE": replace}
        LAUNCHES.launch(
            replace, moving, kept, kernel, (parts,), args, kept, tail, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip


class Stream(NamedTuple):
    """The tensors of the hidden or the encoder states, in a kernel; see `commit`."""

    h_in_ptr: Any
    h_fn_ptr: Any
    h_out_ptr: Any
    p_ref_ptr: Any
    ring_ptr: Any


@triton.jit(do_not_specialize=["blocks"])
def _commit_kernel(
    h_fn_ptr, h_out_ptr, h_in_ptr, encoder_fn_ptr, encoder_out_ptr,
    ring_ptr, counters_ptr, p_ref_ptr, encoder_ring_ptr, scales_ptr, encoder_scales_ptr,
    size, blocks, encoder_size, BLOCK: tl.constexpr, REPLACE: tl.constexpr,
):  # fmt: skip
    """The first `blocks` programs take the hidden states, the others the encoder states."""
    block = tl.program_id(0)
    slot = tl.load(counters_ptr + LANE.SLOT).to(tl.int64)
    if encoder_fn_ptr is None or block < blocks:
        stream = Stream(h_in_ptr, h_fn_ptr, h_out_ptr, p_ref_ptr, ring_ptr)
        commit_block(stream, slot, size, block, REPLACE, BLOCK)
    else:
        encoder = Stream(None, encoder_fn_ptr, encoder_out_ptr, None, encoder_ring_ptr)
        commit_block(encoder, slot, encoder_size, block - blocks, REPLACE, BLOCK)


@triton.jit
def commit_block(stream, slot, size, block, REPLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Store the residuals of block `block` of a stream of `size` elements."""
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    residual = _residual(stream, offsets, mask, REPLACE)
    slot_ptr = stream.ring_ptr + slot * size
    tl.store(slot_ptr + offsets, residual.to(stream.ring_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _residual(stream, offsets, mask, REPLACE: tl.constexpr):
    """Return the residual for the ring, in float32, and store the probe residual on the way."""
    h_out = tl.load(stream.h_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    residual = h_out
    if stream.p_ref_ptr is not None:
        h_fn = tl.load(stream.h_fn_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        compared = h_fn
        if stream.h_in_ptr is not None:
            compared -= tl.load(stream.h_in_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dtype = stream.p_ref_ptr.dtype.element_ty
        tl.store(stream.p_ref_ptr + offsets, compared.to(dtype), mask=mask)
        if not REPLACE:
            residual = h_out - h_fn
    elif not REPLACE:
        residual = h_out - tl.load(stream.h_fn_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return residual


@triton.jit(do_not_specialize=["tokens", "blocks", "encoder_tokens"])
def _commit_fp8_kernel(
    h_fn_ptr, h_out_ptr, h_in_ptr, encoder_fn_ptr, encoder_out_ptr,
    ring_ptr, counters_ptr, p_ref_ptr, encoder_ring_ptr, scales_ptr, encoder_scales_ptr,
    tokens, width, blocks, encoder_tokens, encoder_width, NATIVE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REPLACE: tl.constexpr,
):  # fmt: skip
    """As `_commit_kernel`, with ROWS whole tokens per program."""
    block = tl.program_id(0)
    slot = tl.load(counters_ptr + LANE.SLOT).to(tl.int64)
    if encoder_fn_ptr is None or block < blocks:
        stream = Stream(h_in_ptr, h_fn_ptr, h_out_ptr, p_ref_ptr, ring_ptr)
        _commit_tokens(
            stream, scales_ptr, slot, tokens, width, block, REPLACE, NATIVE, ROWS, COLUMNS
        )
    else:
        encoder = Stream(None, encoder_fn_ptr, encoder_out_ptr, None, encoder_ring_ptr)
        _commit_tokens(
            encoder, encoder_scales_ptr, slot, encoder_tokens, encoder_width, block - blocks,
            REPLACE, NATIVE, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _commit_tokens(
    stream, scales_ptr, slot, tokens, width, block,
    REPLACE: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    offsets = rows[:, None] * width + columns[None, :]
    mask = (rows < tokens)[:, None] & (columns < width)[None, :]
    residual = _residual(stream, offsets, mask, REPLACE)
    codes, scales = quantize_rows(residual, NATIVE)
    slot_ptr = stream.ring_ptr + slot * tokens * width
    tl.store(slot_ptr + offsets, codes, mask=mask)
    tl.store(scales_ptr + slot * tokens + rows, scales, mask=rows < tokens)
