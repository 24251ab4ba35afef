"""The decision of one step on which single blocks may be skipped (DBPrune), for all its blocks.

The rules of `decide` for the plan, the limits and the reference come first. Where none of them
applies, the blocks that `decide_blocks` found are skipped, and

    at least one is skipped                    THRESHOLD_ALWAYS if the threshold is >= 1,
                                               else BELOW_THRESHOLD
    none is, and the change of each is NaN     NAN, also where nothing was measured
    none is                                    ABOVE_THRESHOLD

A step on which a block is skipped counts as a cached one, and what the plan caches skips all blocks
that may be skipped. The blocks that run are stored (`store_block`) where nothing is stored yet, and
else on every ``store[EVERY]``-th step.

Scalar arithmetic, once in Python (the reference) and once as a Triton kernel; the two agree bit for
bit.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import DECIDED, LANE, REASONS, Reason, State
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import Impl
from dbcache.kernels.decision.decide import choose, choose_once, counts_of
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.block_state import BLOCKS, BlockSteps, check_decisions


def decide_step(state: BlockSteps, decisions: Tensor | None, *, impl: Impl = "auto") -> None:
    """Decide the next step of `state` and advance it, in place.

    ``flags`` then says which blocks are skipped, and ``store`` what becomes of the others;
    ``counters[CACHED]`` and ``[REASON]`` are those of the step. Its trace has them too, with
    the smallest change of a block that may be skipped: NaN if all are, -1 if it was not measured.

    Args:
        state: state of the steps, with ``counters[STEP] < capacity``.
        decisions: float32 (M, 2), on the state's device, as `decide_blocks` left them; looked at
            where no other rule decides. None if nothing was measured.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the state on the host, which synchronises if it is on a GPU; Triton does
    not.

    Raises:
        ValueError: `decisions` do not fit.
        RuntimeError: the state has no room for the step (reference only; Triton decides it as
            DYNAMIC and leaves it out of the traces).
    """
    if decisions is not None:
        check_decisions("decide_step", decisions, state.flags)
    _decide_step(impl, state, decisions)


def decide_step_reference(state: BlockSteps, decisions: Tensor | None) -> None:
    """Plain Python, the meaning of `decide_step`."""
    if state.host is None:
        on_cpu = state.clone("cpu")
        decide_step_reference(on_cpu, decisions)
        state.copy_(on_cpu)
        return
    counters, values, _, thresholds, plan, trace_reason, trace_diff, *of_blocks = state.host
    prunable, flags, store, _ = of_blocks
    step, reference = counters[ls.STEP], counters[ls.REFERENCE]
    if step >= len(plan):
        raise RuntimeError(
            f"decide_step: the step must be below the capacity of the state, {len(plan)}, "
            f"got {step}; call BlockSteps.grow"
        )
    reason = choose(state.host, plan[step], None)
    skipped, diff = [0] * len(prunable), -1.0
    if reason == Reason.NAN and decisions is not None:
        skipped, diff, reason = _of_blocks(prunable, decisions.tolist(), thresholds[ls.THRESHOLD])
    elif reason == Reason.STATIC:
        skipped = prunable
    for i, flag in enumerate(skipped):
        flags[i] = flag
    state.trace[step] = state.flags
    cached = reason >= Reason.STATIC
    counters[ls.CACHED], counters[ls.REASON] = int(cached), reason
    counters[ls.CACHED_STEPS] += cached
    counters[ls.CONSECUTIVE] = counters[ls.CONSECUTIVE] + 1 if cached else 0
    counters[ls.REFERENCE] = 1
    counters[ls.STEP] = step + 1
    store[bs.DUE] = 2 * (step % store[bs.EVERY] == 0) if reference == 1 else 1
    store[bs.STAMP] = step
    values[ls.DIFF] = trace_diff[step] = diff
    trace_reason[step] = reason


def _of_blocks(
    prunable: Sequence[int], decisions: Sequence[Sequence[float]], threshold: float
) -> tuple[list[int], float, Reason]:
    """Return which blocks are skipped, the smallest change of one that may be, and the reason."""
    flags = [int(skipped > 0) for _, skipped in decisions]
    known = [diff for diff, _ in decisions if diff == diff]
    own = [diff for (diff, _), may in zip(decisions, prunable, strict=True) if may and diff == diff]
    reason = Reason.ABOVE_THRESHOLD if known else Reason.NAN
    if any(flags):
        reason = Reason.THRESHOLD_ALWAYS if threshold >= 1 else Reason.BELOW_THRESHOLD
    return flags, min(own, default=float("nan")), reason


@op(decide_step_reference, like="state.flags", mutates=(*DECIDED, "flags", "store", "trace"))
def _decide_step(state, decisions):
    _decide_step_kernel[(1,)](
        *state.tensors(), decisions, state.capacity, state.flags.shape[0],
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["capacity", "blocks"])
def _decide_step_kernel(
    counters_ptr, values_ptr, limits_ptr, thresholds_ptr, plan_ptr, trace_reason_ptr,
    trace_diff_ptr, prunable_ptr, flags_ptr, store_ptr, trace_ptr, decisions_ptr, capacity, blocks,
):  # fmt: skip
    """The function `decide_step_reference` above; one program of one warp."""
    step = tl.load(counters_ptr + LANE.STEP)
    planned = step < capacity
    state = State(
        counters_ptr, values_ptr, limits_ptr, thresholds_ptr, plan_ptr, None, None, capacity
    )
    counts = counts_of(state, step)
    reason = choose_once(state, counts, tl.full((), 0.0, tl.float32), False)
    every = tl.load(store_ptr + BLOCKS.EVERY)
    # all threads read before the first one writes
    tl.debug_barrier()
    static = reason == REASONS.STATIC
    open_ = (reason == REASONS.NAN) & (decisions_ptr is not None)
    any_skipped, any_known, any_own = static & False, static & False, static & False
    smallest = tl.full((), float("inf"), tl.float32)
    for i in range(blocks):
        may = tl.load(prunable_ptr + i) != 0
        skipped = static & may
        if decisions_ptr is not None:
            diff = tl.load(decisions_ptr + 2 * i)
            skipped |= open_ & (tl.load(decisions_ptr + 2 * i + 1) > 0)
            known = diff == diff
            any_known |= known
            any_own |= known & may
            smallest = tl.where(known & may & (diff < smallest), diff, smallest)
        any_skipped |= skipped
        tl.store(flags_ptr + i, skipped.to(tl.int32))
        tl.store(trace_ptr + step * blocks + i, skipped.to(tl.int32), mask=planned)
    always = tl.load(thresholds_ptr + LANE.THRESHOLD) >= 1.0
    skipping = tl.where(always, REASONS.THRESHOLD_ALWAYS, REASONS.BELOW_THRESHOLD)
    running = tl.where(any_known, REASONS.ABOVE_THRESHOLD, REASONS.NAN)
    reason = tl.where(open_, tl.where(any_skipped, skipping, running), reason)
    diff = tl.where(open_, tl.where(any_own, smallest, float("nan")), -1.0)
    cached = reason >= REASONS.STATIC
    due = tl.where(counts.reference == 1, tl.where(step % every == 0, 2, 0), 1)
    tl.store(counters_ptr + LANE.CACHED, cached.to(tl.int32))
    tl.store(counters_ptr + LANE.REASON, reason)
    tl.store(counters_ptr + LANE.CACHED_STEPS, counts.cached_steps + cached.to(tl.int32))
    tl.store(counters_ptr + LANE.CONSECUTIVE, tl.where(cached, counts.consecutive + 1, 0))
    tl.store(counters_ptr + LANE.REFERENCE, 1)
    tl.store(counters_ptr + LANE.STEP, step + 1)
    tl.store(store_ptr + BLOCKS.DUE, due)
    tl.store(store_ptr + BLOCKS.STAMP, step)
    tl.store(values_ptr + LANE.DIFF, diff)
    tl.store(trace_reason_ptr + step, reason, mask=planned)
    tl.store(trace_diff_ptr + step, diff, mask=planned)
