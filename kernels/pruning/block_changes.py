"""The change of each block's input since the block was stored, before any block runs.

What a block will get is what the first one gets now, plus what the blocks before it added when they
were stored. With X_i the stored inputs and R_i the stored residuals, the difference to X_i is

    b_0     = h - X_0
    b_{i+1} = b_i                          if blocks i and i + 1 were stored on the same step,
              b_i + X_i + R_i - X_{i+1}    else

since X_{i+1} = X_i + R_i on one step. The op sums |b_i| and |X_i| of all blocks in one pass over X,
and over those R_i where the step changes: bound by memory bandwidth, (M + 1) * numel * itemsize
bytes after a step on which all blocks ran. Neither the estimated inputs nor the differences are
ever in memory.

For the blocks up to the first that runs this is exact, and it is what DBPrune compares
(github.com/vipshop/cache-dit); `decide_blocks` corrects it behind that one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.checks import check_shared, check_tensor
from dbcache.kernels.common.launches import BLOCK, contiguous
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import Impl, invalid, select, without_gradient
from dbcache.kernels.common.sums import lanes_of, log2, partition, tree_sums_of_two


def block_changes(
    h: Tensor, inputs: Tensor, residuals: Tensor, stamps: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Return partial sums of ``|b_i|`` and ``|X_i|`` for each block i and each sample.

    Differences and sums are float32. The same inputs give the same bits on every run.

    Args:
        h: what the first block is called with, (B, ...) with B >= 1, float32, float16 or bfloat16.
            Any strides; copied first where not contiguous.
        inputs: X, (M, *h.shape), contiguous, of the dtype of `h`, as `store_block` left it.
        residuals: R, the same.
        stamps: int32 (M,): the step on which each block was stored.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    Returns:
        float32 (M, B, T, 2) on the same device: ``[..., 0]`` of ``|b|``, ``[..., 1]`` of ``|X|``;
        T as in `probe_diff`. No gradient. The reference reads the stamps on the host, which
        synchronises if they are on a GPU; Triton does not.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    who, blocks = "block_changes", inputs.shape[0]
    if h.ndim < 2 or h.shape[0] == 0 or blocks == 0:
        raise invalid(who, "h must be (B, ...) and the stored ones (M, B, ...)", tuple(h.shape))
    check_shared(who, "dtype", h=h, inputs=inputs, residuals=residuals)
    for name, stored in (("inputs", inputs), ("residuals", residuals)):
        check_tensor(who, name, stored, h.dtype, (blocks, *h.shape), h.device, contiguous=True)
    check_tensor(who, "stamps", stamps, torch.int32, (blocks,), h.device)
    return _block_changes(impl, h, inputs, residuals, stamps)


@without_gradient
def block_changes_reference(h: Tensor, inputs: Tensor, residuals: Tensor, stamps: Tensor) -> Tensor:
    """Plain PyTorch, the meaning of `block_changes`."""
    steps, partials = stamps.tolist(), []
    for i, step in enumerate(steps):
        x = inputs[i].float()
        if i == 0:
            difference = h.float() - x
        elif step != steps[i - 1]:
            expected = inputs[i - 1].float() + residuals[i - 1].float()
            difference = difference + (expected - x)
        sums = [y.abs().flatten(1).sum(1) for y in (difference, x)]
        partials.append(torch.stack(sums, -1).unsqueeze_(1))
    return torch.stack(partials)


def _fake(h, inputs, residuals, stamps, impl):
    programs = partition(h.shape, by_token=False)[1] if select(impl, h) == "triton" else 1
    return h.new_empty((inputs.shape[0], h.shape[0], programs, 2), dtype=torch.float32)


@op(block_changes_reference, like="h", fake=_fake)
def _block_changes(h, inputs, residuals, stamps):
    blocks, batch = inputs.shape[0], h.shape[0]
    per_program, programs = partition(h.shape, by_token=False)
    partials = torch.empty(blocks, batch, programs, 2, device=h.device, dtype=torch.float32)
    _block_changes_kernel[(programs, batch)](
        *contiguous(h), inputs, residuals, stamps, partials, h.numel() // batch, per_program,
        blocks, LOG_BLOCK=log2(BLOCK), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return partials


@triton.jit(do_not_specialize=["per_program", "blocks"])
def _block_changes_kernel(
    h_ptr, inputs_ptr, residuals_ptr, stamps_ptr, partials_ptr, size, per_program, blocks,
    LOG_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (p, sample) takes the same elements of all blocks, and adds to sums of its own."""
    program, sample = tl.program_id(0), tl.program_id(1)
    programs, samples = tl.num_programs(0), tl.num_programs(1)
    start = sample.to(tl.int64) * size
    between = tl.cast(size, tl.int64) * samples  # from one block's tensor to the next one's
    for i in range(per_program):
        inside = lanes_of(program, per_program, i, LOG_BLOCK)
        mask = inside < size
        offsets = start + inside
        # the first block is compared with itself, so that the sum of h and nothing is h
        difference = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        before = tl.zeros((1 << LOG_BLOCK,), inputs_ptr.dtype.element_ty)
        step = tl.load(stamps_ptr) - 1
        following = tl.load(inputs_ptr + offsets, mask=mask, other=0.0)
        for block in range(blocks):
            stored, x = following, following.to(tl.float32)
            stamp = tl.load(stamps_ptr + block)
            moved = stamp != step
            # not read: the residual before block 0, and one stored on the same step
            used = mask & (inside < tl.where(moved & (block > 0), size, 0))
            last = tl.maximum(block - 1, 0)
            added = tl.load(residuals_ptr + between * last + offsets, mask=used, other=0.0)
            shifted = difference + ((before.to(tl.float32) + added.to(tl.float32)) - x)
            difference = tl.where(moved, shifted, difference)
            before, step = stored, stamp
            # the next block's input, before the barriers of this one's sums
            after = mask & (inside < tl.where(block + 1 < blocks, size, 0))
            next_ptr = inputs_ptr + between * (block + 1)
            following = tl.load(next_ptr + offsets, mask=after, other=0.0)
            num, den = tree_sums_of_two(tl.abs(difference), tl.abs(x), LOG_BLOCK)
            out_ptr = partials_ptr + ((block * samples + sample) * programs + program) * 2
            if i > 0:
                num += tl.load(out_ptr)
                den += tl.load(out_ptr + 1)
            tl.store(out_ptr, num)
            tl.store(out_ptr + 1, den)
        # other threads read the stores of this round in the next one
        tl.debug_barrier()
