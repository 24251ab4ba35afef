"""The decision of one step of one lane: run in full or cache, and with which weights.

Scalar arithmetic on the few numbers of a `LaneState`, once in Python (the reference) and once as
Triton device functions. The two agree bit for bit: each operation is float32, rounded once, in the
same order. In this order, the first rule that applies decides:

    plan says WARMUP or MASK                       full
    plan says KNOWN + a reason                     as the reason says, full without a reference
    plan says STATIC                               cached if there is a reference, else full
    cached steps, cached steps in a row or the accumulated change at their limit        full
    no reference, or one of another shape or dtype                                      full
    threshold <= 0: full;  change is NaN: full;  threshold >= 1: cached (Signal.CHANGE only)
    change < threshold: cached, else full

The change is the relative L1 of `probe_diff`, of the batch as a whole or of its worst sample
(``limits[BATCH_REDUCE]``), or what `step_signal` makes of it: then this step's change and those
since the last full step are summed, and the sum is compared. The weights are those of `taylor`. All
of it is computed here, too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LANE, PLANS, REASONS, LaneState, Reason, State
from dbcache.kernels.common.launches import contiguous
from dbcache.kernels.common.op import op
from dbcache.kernels.common.plans import Plans
from dbcache.kernels.common.select import Impl
from dbcache.kernels.common.sums import Partials, check_partials, f32, lanes_for
from dbcache.kernels.decision.step_signal import (
    is_ready,
    is_signal_ready,
    is_summed,
    signal_of,
    signal_of_partials,
)
from dbcache.kernels.prediction.taylor import Ring, store_weights, weights_by_slot


def decide(state: LaneState, partials: Tensor | None, *, impl: Impl = "auto") -> None:
    """Decide the next step of `state`, compute its weights, and advance the state, in place.

    ``counters[CACHED]`` then says 1 (replace the blocks by `predict` with ``state.weights``) or 0
    (run them, then `commit` to ``counters[SLOT]``); ``counters[REASON]`` says why.

    Args:
        state: state of the lane, with ``counters[STEP] < state.capacity``.
        partials: float32 (B, T, 2 or 4) from `probe_diff`, with T <= MAX_PARTIALS, on the state's
            device; ``sum[..., 0] / sum[..., 1]``, of the batch or the largest of a sample, is the
            change that is compared with the threshold; ``sum[..., 2] / sum[..., 3]``, where there
            are important tokens. None if it was not measured. It is looked at in DYNAMIC steps
            with a valid reference, recorded there even if a limit decides, and without it those
            run in full.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the state on the host, which synchronises if it is on a GPU; Triton does
    not.

    Raises:
        ValueError: `partials` does not fit.
        RuntimeError: the state has no room for the step (reference only; Triton decides it as
            DYNAMIC and leaves it out of the traces).
    """
    counters = state.counters
    found = LAUNCHES.find(impl, partials is None, (partials,), (counters, state.plan))
    if found is not None:
        return found[0].launch(*found[1])
    if partials is not None:
        check_partials("decide", partials, counters.device, widths=(2, 4))
    return _decide(impl, state, partials)


LAUNCHES = Plans()

WEIGHTS = slice(ls.WEIGHTS, ls.WEIGHTS + ls.MAX_SLOTS)
ENCODER = slice(ls.ENCODER_WEIGHTS, ls.ENCODER_WEIGHTS + ls.MAX_SLOTS)
# an enumeration takes longer to find a member than a comparison takes
DYNAMIC, CHANGE = ls.PlanCode.DYNAMIC, ls.Signal.CHANGE
BELOW, ABOVE = Reason.BELOW_THRESHOLD, Reason.ABOVE_THRESHOLD


def decide_reference(state: LaneState, partials: Tensor | None) -> None:
    """Plain Python, the meaning of `decide`."""
    decide_sums(state, None if partials is None else partials.tolist())


def decide_sums(state: LaneState, sums: Sequence[Sequence[Sequence[float]]] | None) -> None:
    """`decide_reference`, for nested lists (B, T, 2 or 4)."""
    if state.host is None:
        on_cpu = state.clone("cpu")
        decide_sums(on_cpu, sums)
        state.copy_(on_cpu)
        return
    # reads take a fraction of a tensor's time, and what is written is rounded to float32
    counters, values, limits, _, plan, trace_reason, trace_diff = state.host
    step = counters[ls.STEP]
    if step >= len(plan):
        raise RuntimeError(
            f"decide: the step must be below the capacity of the state, {len(plan)}, "
            f"got {step}; call LaneState.grow"
        )
    code, diff = plan[step], None
    if sums is not None and code == DYNAMIC and counters[ls.REFERENCE] == 1:
        if is_ready(limits, values):
            diff = signal_of(sums, state.host)
    advance(state.host, code, diff)
    trace_reason[step] = counters[ls.REASON]
    trace_diff[step] = values[ls.DIFF]


def advance(lane: ls.Numbers, code: int, diff: float | None) -> None:
    """Advance counters and values by a step of plan code `code` with the change `diff`."""
    reason = choose(lane, code, diff)
    counters, values, limits, thresholds = lane[:4]
    step, slots, head = counters[ls.STEP], limits[ls.SLOTS], counters[ls.HEAD]
    cached = reason >= ls.FIRST_CACHED
    if cached:
        counters[ls.CACHED_STEPS] += 1
        counters[ls.CONSECUTIVE] += 1
        if diff is not None:
            values[ls.ACCUMULATED] = f32(values[ls.ACCUMULATED] + diff)
        steps = tuple(ls.steps_newest_first(counters, slots))
        rule = (head, slots), (limits[ls.PREDICTOR], thresholds[ls.SCALE])
        for entries, order in (WEIGHTS, limits[ls.ORDER]), (ENCODER, limits[ls.ENCODER_ORDER]):
            values[entries] = weights_by_slot(step, steps, order, *rule)
    else:
        counters[ls.SLOT] = head
        counters[ls.RING_STEPS + head] = step
        counters[ls.HEAD] = (head + 1) % slots
        counters[ls.SNAPSHOTS] = min(counters[ls.SNAPSHOTS] + 1, slots)
        counters[ls.CONSECUTIVE] = 0
        counters[ls.REFERENCE] = 1
        values[ls.ACCUMULATED] = 0.0
    counters[ls.CACHED] = int(cached)
    counters[ls.REASON] = reason
    values[ls.DIFF] = -1.0 if diff is None else diff
    counters[ls.STEP] = step + 1


def choose(lane: ls.Numbers, code: int, diff: float | None) -> Reason:
    """Return the reason that decides a step of plan code `code` with the change `diff`."""
    counters, values, limits, thresholds = lane[:4]
    reference, threshold = counters[ls.REFERENCE], thresholds[ls.THRESHOLD]
    if code != DYNAMIC:
        planned = ls.PLANNED[code]
        is_lost = planned >= ls.FIRST_CACHED and reference != 1
        return _missing(reference) if is_lost else planned
    if counters[ls.CACHED_STEPS] >= limits[ls.MAX_CACHED] >= 0:
        return Reason.COUNT_LIMIT
    if counters[ls.CONSECUTIVE] >= limits[ls.MAX_CONSECUTIVE] >= 0:
        return Reason.CONSECUTIVE_LIMIT
    if values[ls.ACCUMULATED] >= thresholds[ls.MAX_ACCUMULATED] > 0:
        return Reason.ACCUMULATED_LIMIT
    if reference != 1 or not is_ready(limits, values):
        return _missing(reference)
    if threshold <= 0:
        return Reason.THRESHOLD_OFF
    if diff is None or diff != diff:
        return Reason.NAN
    if limits[ls.SIGNAL] != CHANGE:
        diff = f32(values[ls.ACCUMULATED] + diff)
    elif threshold >= 1:
        return Reason.THRESHOLD_ALWAYS
    return BELOW if diff < threshold else ABOVE


def _missing(reference: int) -> Reason:
    return Reason.SHAPE_CHANGED if reference == 2 else Reason.NO_REFERENCE


@op(decide_reference, like="state.counters", mutates=ls.DECIDED)
def _decide(state, partials):
    samples, programs, width = (0, 0, 2) if partials is None else partials.shape
    log_lanes, warps = lanes_for(programs)
    tail = {"samples": samples, "programs": programs, "LOG_LANES": log_lanes, "WIDTH": width}
    LAUNCHES.launch(
        partials is None, (partials,), (state.counters, state.plan), _decide_kernel, (1,),
        contiguous(partials), (*state.tensors(), state.capacity), tail,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


class Counts(NamedTuple):
    """The numbers of the step and its lane that `choose` compares, in a kernel."""

    code: Any
    reference: Any
    ready: Any
    cached_steps: Any
    consecutive: Any
    accumulated: Any


@triton.jit
def counts_of(state, step):
    """Load what `choose_once` compares on `step`."""
    counters_ptr = state.counters_ptr
    return Counts(
        tl.load(state.plan_ptr + step, mask=step < state.capacity, other=PLANS.DYNAMIC),
        tl.load(counters_ptr + LANE.REFERENCE),
        is_signal_ready(state),
        tl.load(counters_ptr + LANE.CACHED_STEPS),
        tl.load(counters_ptr + LANE.CONSECUTIVE),
        tl.load(state.values_ptr + LANE.ACCUMULATED),
    )


@triton.jit(do_not_specialize=["capacity", "samples", "programs"])
def _decide_kernel(
    partials_ptr, counters_ptr, values_ptr, limits_ptr, thresholds_ptr, plan_ptr,
    trace_reason_ptr, trace_diff_ptr, capacity, samples, programs,
    LOG_LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    state = State(
        counters_ptr, values_ptr, limits_ptr, thresholds_ptr, plan_ptr, trace_reason_ptr,
        trace_diff_ptr, capacity,
    )  # fmt: skip
    decide_once(state, Partials(partials_ptr, samples, programs), LOG_LANES, WIDTH)


@triton.jit
def decide_once(state, partials, LOG_LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The function `decide_reference` above, for `Partials` of WIDTH sums.

    One program of a launch may run it, with programs <= 2**LOG_LANES.
    """
    MEASURED: tl.constexpr = partials.ptr is not None
    diff = tl.full((), -1.0, tl.float32)
    if MEASURED:
        diff = signal_of_partials(partials, state, LOG_LANES, WIDTH)
    counters_ptr, values_ptr = state.counters_ptr, state.values_ptr
    step = tl.load(counters_ptr + LANE.STEP)
    planned, counts = step < state.capacity, counts_of(state, step)
    measured = MEASURED & is_undecided(counts)
    reason = choose_once(state, counts, diff, MEASURED)
    cached = reason >= REASONS.STATIC

    slots = tl.load(state.limits_ptr + LANE.SLOTS)
    snapshots = tl.load(counters_ptr + LANE.SNAPSHOTS)
    head = tl.load(counters_ptr + LANE.HEAD)
    # every warp reads before the first one writes, or they would not take the same branch
    tl.debug_barrier()
    if cached:
        _store_weights(state, step, head, slots, snapshots)
        tl.store(counters_ptr + LANE.CACHED_STEPS, counts.cached_steps + 1)
        tl.store(counters_ptr + LANE.CONSECUTIVE, counts.consecutive + 1)
        tl.store(values_ptr + LANE.ACCUMULATED, counts.accumulated + diff, mask=measured)
    else:
        tl.store(counters_ptr + LANE.SLOT, head)
        tl.store(counters_ptr + LANE.RING_STEPS + head, step)
        tl.store(counters_ptr + LANE.HEAD, (head + 1) % slots)
        tl.store(counters_ptr + LANE.SNAPSHOTS, tl.minimum(snapshots + 1, slots))
        tl.store(counters_ptr + LANE.CONSECUTIVE, 0)
        tl.store(counters_ptr + LANE.REFERENCE, 1)
        tl.store(values_ptr + LANE.ACCUMULATED, 0.0)
    diff = tl.where(measured, diff, -1.0)
    tl.store(counters_ptr + LANE.CACHED, cached.to(tl.int32))
    tl.store(counters_ptr + LANE.REASON, reason)
    tl.store(values_ptr + LANE.DIFF, diff)
    tl.store(state.trace_reason_ptr + step, reason, mask=planned)
    tl.store(state.trace_diff_ptr + step, diff, mask=planned)
    tl.store(counters_ptr + LANE.STEP, step + 1)


@triton.jit
def is_undecided(counts):
    """Whether the plan leaves the step to its change, which can be measured."""
    return (counts.code == PLANS.DYNAMIC) & (counts.reference == 1) & counts.ready


@triton.jit
def _store_weights(state, step, head, slots, snapshots):
    """Store the weights of both streams, as `advance` does."""
    order = tl.load(state.limits_ptr + LANE.ORDER)
    encoder_order = tl.load(state.limits_ptr + LANE.ENCODER_ORDER)
    ring = Ring(state.counters_ptr + LANE.RING_STEPS, head, slots, snapshots)
    predictor = tl.load(state.limits_ptr + LANE.PREDICTOR)
    scale = tl.load(state.thresholds_ptr + LANE.SCALE)
    weights_ptr = state.values_ptr + LANE.WEIGHTS
    store_weights(weights_ptr, ring, step, order, predictor, scale)
    weights_ptr = state.values_ptr + LANE.ENCODER_WEIGHTS
    store_weights(weights_ptr, ring, step, encoder_order, predictor, scale)


@triton.jit
def choose_once(state, counts, diff, MEASURED: tl.constexpr):
    """The function `choose` above, from the last rule to the first: a later line overrides."""
    code, reference, accumulated = counts.code, counts.reference, counts.accumulated
    max_cached = tl.load(state.limits_ptr + LANE.MAX_CACHED)
    max_consecutive = tl.load(state.limits_ptr + LANE.MAX_CONSECUTIVE)
    threshold = tl.load(state.thresholds_ptr + LANE.THRESHOLD)
    max_accumulated = tl.load(state.thresholds_ptr + LANE.MAX_ACCUMULATED)
    missing = tl.where(reference == 2, REASONS.SHAPE_CHANGED, REASONS.NO_REFERENCE)

    summed = is_summed(state)
    compared = tl.where(summed, accumulated + diff, diff)
    reason = tl.where(compared < threshold, REASONS.BELOW_THRESHOLD, REASONS.ABOVE_THRESHOLD)
    reason = tl.where((threshold >= 1.0) & ~summed, REASONS.THRESHOLD_ALWAYS, reason)
    reason = tl.where((not MEASURED) | (diff != diff), REASONS.NAN, reason)
    reason = tl.where(threshold <= 0.0, REASONS.THRESHOLD_OFF, reason)
    reason = tl.where((reference == 1) & counts.ready, reason, missing)
    over = (max_accumulated > 0.0) & (accumulated >= max_accumulated)
    reason = tl.where(over, REASONS.ACCUMULATED_LIMIT, reason)
    over = (max_consecutive >= 0) & (counts.consecutive >= max_consecutive)
    reason = tl.where(over, REASONS.CONSECUTIVE_LIMIT, reason)
    over = (max_cached >= 0) & (counts.cached_steps >= max_cached)
    reason = tl.where(over, REASONS.COUNT_LIMIT, reason)

    is_lost = (code >= LANE.KNOWN + REASONS.STATIC) & (reference != 1)
    known = tl.where(is_lost, missing, code - LANE.KNOWN)
    reason = tl.where(code >= LANE.KNOWN, known, reason)
    static = tl.where(reference == 1, REASONS.STATIC, missing)
    reason = tl.where(code == PLANS.STATIC, static, reason)
    reason = tl.where(code == PLANS.WARMUP, REASONS.WARMUP, reason)
    return tl.where(code == PLANS.MASK, REASONS.MASK, reason)
