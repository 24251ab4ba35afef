"""Store a block's input and residuals after it ran, so that it can be skipped later.

    growth_sums[i] := sums of |h_out - (X + R)| and |h_in - X|     of what was stored before
    X := h_in,   R := h_out - h_in,   the same residual of the encoder states
    stamps[i] := step

all of it only on a step on which it is due, as `decide_step` found: neither that nor the step has
to be known to the host.

One launch for hidden and encoder states, in place, so that the kernel is bound by memory bandwidth:
it reads four tensors and writes two. The growth, the quotient of the two sums, is how much more
(or less) the block's output changed than its input; see `decide_blocks`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.checks import check_shared, check_tensor
from dbcache.kernels.common.launches import BLOCK, cdiv, contiguous
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import DTYPES, Impl, invalid, without_gradient
from dbcache.kernels.common.sums import lanes_of, log2, partition_of, tree_sums_of_two
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.block_state import BLOCKS, BlockState

WARPS = 8
"""With 4, sixteen elements of four tensors and two sums per thread spill on sm_100."""


def store_block(
    state: BlockState,
    store: Tensor,
    index: int,
    h_in: Tensor,
    h_out: Tensor,
    encoder_in: Tensor | None = None,
    encoder_out: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Store the input, the residuals and the growth of block `index`.

    Differences are taken in float32 and rounded once, to the dtype of the model.

    Args:
        state: state of the run, of the dtype and shapes of the streams.
        store: int32 (NUM_STORE,), on the device of the state: ``store[DUE]`` is 0 where nothing is
            to be stored, 1 where nothing was stored of the block yet, so that there is no growth
            (both sums are 0), else 2; ``store[STAMP]`` is the step, written to ``stamps[index]``.
        index: which block of the run, 0 to M - 1.
        h_in: what the block was called with, float32, float16 or bfloat16. Any strides; copied
            first where not contiguous.
        h_out: what it returned, same shape and dtype.
        encoder_in: second stream, of any size of its own; None where the block returned none.
        encoder_out: as `h_out`.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    Triton does not synchronise; the reference reads `store` on the host.

    Raises:
        ValueError: index, shapes, dtypes or devices do not fit.
    """
    who, blocks = "store_block", state.inputs.shape[0]
    if not 0 <= index < blocks:
        raise invalid(who, f"index must be from 0 to {blocks - 1}", index)
    check_tensor(who, "store", store, torch.int32, (bs.NUM_STORE,), state.stamps.device)
    if (encoder_in is None) != (encoder_out is None):
        raise ValueError(f"{who}: encoder_in and encoder_out must come together, got one of them")
    streams = [("h", h_in, h_out, state.inputs)]
    if encoder_in is not None and encoder_out is not None:
        if state.encoder_residuals is None:
            must = "the state must have been allocated with encoder states"
            raise invalid(who, must, "one without")
        streams.append(("encoder", encoder_in, encoder_out, state.encoder_residuals))
    for name, x, y, kept in streams:
        if x.dtype != y.dtype or x.dtype not in DTYPES:
            check_shared(who, "dtype", **{f"{name}_in": x, f"{name}_out": y})
        form = (kept.dtype, kept.shape[1:], kept.device)
        check_tensor(who, f"{name}_in", x, *form)
        check_tensor(who, f"{name}_out", y, *form)
    before, after = [x for _, x, *_ in streams], [y for *_, y, _ in streams]
    _store_block(impl, state, store, index, before, after)


@without_gradient
def store_block_reference(
    state: BlockState, store: Tensor, index: int, before: Sequence[Tensor], after: Sequence[Tensor]
) -> None:
    """Plain PyTorch, the meaning of `store_block`."""
    _, due, step = store.tolist()
    if not due:
        return
    (h_in, *encoder_in), (h_out, *encoder_out) = before, after
    x, added, sums = state.inputs[index], state.residuals[index], state.growth_sums[index]
    sums.zero_()
    if due > 1:
        expected = x.float() + added.float()
        sums[0, 0] = (h_out.float() - expected).abs_().sum()
        sums[0, 1] = (h_in.float() - x.float()).abs_().sum()
    x.copy_(h_in)
    torch.sub(h_out, h_in, out=added)  # PyTorch subtracts in float32 and rounds once
    if encoder_in and state.encoder_residuals is not None:
        torch.sub(encoder_out[0], encoder_in[0], out=state.encoder_residuals[index])
    state.stamps[index] = step


WRITTEN = ("inputs", "residuals", "encoder_residuals", "stamps", "growth_sums")


@op(store_block_reference, like="before", mutates=WRITTEN)
def _store_block(state, store, index, before, after):
    (h_in, h_out), *rest = zip(contiguous(*before), contiguous(*after), strict=True)
    encoder_in, encoder_out = rest[0] if rest else (None, None)
    encoder_size, encoder_added = 0, None
    if encoder_in is not None:
        encoder_size, encoder_added = encoder_in.numel(), state.encoder_residuals[index]
    per_program, programs = partition_of(h_in.numel())
    if state.growth_sums.shape[1] != programs:
        must = f"the state must have been allocated for Triton, with {programs} sums per block"
        raise invalid("store_block", must, state.growth_sums.shape[1])
    _store_block_kernel[(programs + cdiv(encoder_size, BLOCK),)](
        h_in, h_out, state.inputs[index], state.residuals[index], state.growth_sums, state.stamps,
        store, index, h_in.numel(), per_program, programs,
        encoder_in, encoder_out, encoder_added, encoder_size,
        LOG_BLOCK=log2(BLOCK), num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["index", "per_program", "programs"])
def _store_block_kernel(
    h_in_ptr, h_out_ptr, x_ptr, added_ptr, sums_ptr, stamps_ptr, store_ptr, index, size,
    per_program, programs, encoder_in_ptr, encoder_out_ptr, encoder_added_ptr, encoder_size,
    LOG_BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `programs` programs take the hidden states, the others the encoder states."""
    program = tl.program_id(0)
    due = tl.load(store_ptr + BLOCKS.DUE)
    if due == 0:
        return
    if encoder_in_ptr is None or program < programs:
        num = tl.zeros((1 << LOG_BLOCK,), tl.float32)
        den = num
        for i in range(per_program):
            offsets = lanes_of(program, per_program, i, LOG_BLOCK)
            mask = offsets < size
            h_in = tl.load(h_in_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            h_out = tl.load(h_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            known = mask & (offsets < tl.where(due > 1, size, 0))
            x = tl.load(x_ptr + offsets, mask=known, other=0.0).to(tl.float32)
            added = tl.load(added_ptr + offsets, mask=known, other=0.0).to(tl.float32)
            num += tl.where(known, tl.abs(h_out - (x + added)), 0.0)
            den += tl.where(known, tl.abs(h_in - x), 0.0)
            tl.store(x_ptr + offsets, h_in.to(x_ptr.dtype.element_ty), mask=mask)
            residual = (h_out - h_in).to(added_ptr.dtype.element_ty)
            tl.store(added_ptr + offsets, residual, mask=mask)
        out_ptr = sums_ptr + (index * programs + program) * 2
        num, den = tree_sums_of_two(num, den, LOG_BLOCK)
        tl.store(out_ptr, num)
        tl.store(out_ptr + 1, den)
        if program == 0:
            tl.store(stamps_ptr + index, tl.load(store_ptr + BLOCKS.STAMP))
    else:
        block = program - programs
        offsets = lanes_of(block, 1, 0, LOG_BLOCK)
        mask = offsets < encoder_size
        before = tl.load(encoder_in_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        after = tl.load(encoder_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        residual = (after - before).to(encoder_added_ptr.dtype.element_ty)
        tl.store(encoder_added_ptr + offsets, residual, mask=mask)
