"""Which of a stack's last blocks run on a decided step (`Bn_compute_blocks_ids`).

    full step      all run, and are stored:  DUE := 1 for the first time, else 2;  STAMP := the step
    cached step    nothing is stored:        DUE := 0;  STAMP stays
                   those are skipped that `decide_blocks` found, if there is something stored

So ``store[STAMP]`` is the step on which the blocks were stored, and -1 means that nothing is stored
of them. The step is the latest one that `decide` took: neither it nor what is stored has to be
known to the host.

Integer arithmetic, once in PyTorch (the reference) and once as a Triton kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.checks import check_tensor
from dbcache.kernels.common.lane_state import LANE
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import Impl, invalid
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.block_state import BLOCKS, check_decisions


def decide_tail(
    counters: Tensor, decisions: Tensor | None, flags: Tensor, store: Tensor, *, impl: Impl = "auto"
) -> None:
    """Write `flags` and `store` for the latest step, in place.

    Args:
        counters: int32 (NUM_COUNTERS,), of the lane's state, after the step was decided.
        decisions: float32 (M, 2), as `decide_blocks` left them; looked at on cached steps. None if
            nothing was measured: all blocks run.
        flags: int32 (M,): becomes 1 for a block that is skipped, else 0.
        store: int32 (NUM_STORE,), for `store_block`; ``store[EVERY]`` is not used.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the tensors on the host, which synchronises if they are on a GPU; Triton
    does not.

    Raises:
        ValueError: the tensors do not fit.
    """
    who = "decide_tail"
    if flags.ndim != 1 or flags.dtype != torch.int32:
        raise invalid(who, "flags must be int32 (M,)", flags.dtype, tuple(flags.shape))
    check_tensor(who, "counters", counters, torch.int32, (ls.NUM_COUNTERS,), flags.device)
    check_tensor(who, "store", store, torch.int32, (bs.NUM_STORE,), flags.device)
    if decisions is not None:
        check_decisions(who, decisions, flags)
    _decide_tail(impl, counters, decisions, flags, store)


def decide_tail_reference(
    counters: Tensor, decisions: Tensor | None, flags: Tensor, store: Tensor
) -> None:
    """Plain PyTorch, the meaning of `decide_tail`."""
    latest, last_stored = counters.tolist(), int(store[bs.STAMP])
    flags.zero_()
    if latest[ls.CACHED]:
        store[bs.DUE] = 0
        if decisions is not None and last_stored >= 0:
            flags.copy_(decisions[:, 1] > 0)
    else:
        store[bs.DUE] = 2 if last_stored >= 0 else 1
        store[bs.STAMP] = latest[ls.STEP] - 1


@op(decide_tail_reference, like="flags", mutates=("flags", "store"))
def _decide_tail(counters, decisions, flags, store):
    blocks = flags.shape[0]
    _decide_tail_kernel[(1,)](
        counters, decisions, flags, store, blocks,
        LOG_BLOCKS=(blocks - 1).bit_length(), num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks"])
def _decide_tail_kernel(
    counters_ptr, decisions_ptr, flags_ptr, store_ptr, blocks, LOG_BLOCKS: tl.constexpr
):
    """The function `decide_tail_reference` above; one program of one warp."""
    step = tl.load(counters_ptr + LANE.STEP) - 1
    cached = tl.load(counters_ptr + LANE.CACHED) != 0
    last_stored = tl.load(store_ptr + BLOCKS.STAMP)
    # all threads read before the first one writes
    tl.debug_barrier()
    offsets = tl.arange(0, 1 << LOG_BLOCKS)
    mask = offsets < blocks
    left_out = offsets < 0
    if decisions_ptr is not None:
        looked_at = tl.where(cached & (last_stored >= 0), blocks, 0)
        skipped = tl.load(decisions_ptr + 2 * offsets + 1, mask=offsets < looked_at, other=0.0)
        left_out = skipped > 0
    tl.store(flags_ptr + offsets, left_out.to(tl.int32), mask=mask)
    tl.store(store_ptr + BLOCKS.DUE, tl.where(cached, 0, tl.where(last_stored >= 0, 2, 1)))
    tl.store(store_ptr + BLOCKS.STAMP, tl.where(cached, last_stored, step))
