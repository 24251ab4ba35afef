"""One CFG branch measures a step's change, and the other branches of the step reuse it.

The partial sums of a change are kept beside a stamp that says whose they are. With `own` those that
a branch has just measured, and the stamp (branch, step, kind) of those that are kept,

    reused      another branch's, of this step number and kind
    undecided   the change will decide: the plan leaves the step to it, and there is a reference

    reused                      own := kept
    undecided, and not reused   kept := own,  stamp := (this branch, this step, this kind)

The device decides, from the state that `decide` and `decide_step` read. So a captured step reuses a
change exactly where the eager step would. It is what cache-dit
(github.com/vipshop/cache-dit) calls `cfg_diff_compute_separate=False`.

A few kilobytes, one launch. Each program has a stamp of its own, so that none waits for another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.checks import check_shared, check_tensor
from dbcache.kernels.common.lane_state import LANE, REASONS, LaneState, PlanCode, Reason, State
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import Impl
from dbcache.kernels.decision.decide import choose, choose_once, counts_of, is_undecided
from dbcache.kernels.decision.step_signal import is_ready

PROGRAMS = 16
"""Programs of a launch, and stamps."""
BLOCK = 1024


def make_stamps(device: torch.device) -> Tensor:
    """Return int32 stamps (PROGRAMS, 3) that match no step, all -1."""
    return torch.full((PROGRAMS, 3), -1, dtype=torch.int32, device=device)


def share_change(
    own: Tensor,
    kept: Tensor,
    stamps: Tensor,
    state: LaneState,
    branch: int,
    kind: int,
    *,
    by_rules: bool = False,
    impl: Impl = "auto",
) -> None:
    """Reuse what another branch measured on this step, or keep this branch's, in place.

    To be called before the step is decided.

    Args:
        own: partial sums of this branch's change, float32, of any shape, contiguous.
        kept: those that are shared, the same shape, on the same device.
        stamps: from `make_stamps`; one for all `kind`s.
        state: state of the branch's lane on the same device; only read.
        branch: number of the branch, at least 0.
        kind: number of what is measured, at least 0: sums of another kind are never taken over.
        by_rules: the limits come first, and the threshold 0: where they decide, the step is not
            undecided. So it is under DBPrune, where nothing is measured then.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the state on the host, which synchronises if it is on a GPU; Triton does
    not.

    Raises:
        ValueError: the tensors do not fit.
    """
    for name, x in (("own", own), ("kept", kept)):
        check_tensor("share_change", name, x, torch.float32, own.shape, contiguous=True)
    check_tensor("share_change", "stamps", stamps, torch.int32, (PROGRAMS, 3))
    check_shared("share_change", "device", own=own, kept=kept, stamps=stamps, state=state.counters)
    _share_change(impl, own, kept, stamps, state, branch, kind, by_rules)


def share_change_reference(
    own: Tensor,
    kept: Tensor,
    stamps: Tensor,
    state: LaneState,
    branch: int,
    kind: int,
    by_rules: bool,
) -> None:
    """Plain PyTorch and Python, the meaning of `share_change`."""
    lane = state.host or [x.tolist() for x in state.tensors()]
    counters, values, limits, _, plan, *_ = lane
    step = counters[ls.STEP]
    whose, *of = stamps[0].tolist()
    if whose != branch and of == [step, kind]:
        own.copy_(kept)
        return
    code = plan[step] if step < len(plan) else PlanCode.DYNAMIC
    is_open = code == PlanCode.DYNAMIC and counters[ls.REFERENCE] == 1
    if by_rules:
        is_open = is_open and choose(lane, code, None) == Reason.NAN
    if is_open and is_ready(limits, values):
        kept.copy_(own)
        stamps.copy_(torch.tensor([branch, step, kind], dtype=torch.int32, device="cpu"))


@op(share_change_reference, like="own", mutates=("own", "kept", "stamps"))
def _share_change(own, kept, stamps, state, branch, kind, by_rules):
    _share_change_kernel[(PROGRAMS,)](
        own, kept, stamps, *state.tensors()[:5], state.capacity, branch, kind, own.numel(),
        BY_RULES=by_rules, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["capacity", "branch", "kind", "numel"])
def _share_change_kernel(
    own_ptr, kept_ptr, stamps_ptr, counters_ptr, values_ptr, limits_ptr, thresholds_ptr, plan_ptr,
    capacity, branch, kind, numel, BY_RULES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The function `share_change_reference` above, a part of the sums per program."""
    state = State(
        counters_ptr, values_ptr, limits_ptr, thresholds_ptr, plan_ptr, None, None, capacity
    )
    pid, programs = tl.program_id(0), tl.num_programs(0)
    stamp_ptr = stamps_ptr + 3 * pid
    step = tl.load(counters_ptr + LANE.STEP)
    counts = counts_of(state, step)
    undecided = is_undecided(counts)
    if BY_RULES:
        zero = tl.full((), 0.0, tl.float32)
        undecided &= choose_once(state, counts, zero, False) == REASONS.NAN
    is_taken = tl.load(stamp_ptr) != branch
    is_taken &= (tl.load(stamp_ptr + 1) == step) & (tl.load(stamp_ptr + 2) == kind)
    # every warp reads before the first one writes, or they would not take the same branch
    tl.debug_barrier()
    if is_taken:
        _copy(own_ptr, kept_ptr, numel, pid, programs, BLOCK)
    elif undecided:
        _copy(kept_ptr, own_ptr, numel, pid, programs, BLOCK)
        tl.store(stamp_ptr, branch)
        tl.store(stamp_ptr + 1, step)
        tl.store(stamp_ptr + 2, kind)


@triton.jit
def _copy(to_ptr, from_ptr, numel, pid, programs, BLOCK: tl.constexpr):
    for start in range(pid * BLOCK, numel, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < numel
        tl.store(to_ptr + offsets, tl.load(from_ptr + offsets, mask=mask), mask=mask)
