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

import torch
import triton
import triton.language as tl

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState, PlanCode, Reason, Signal
from dbcache.kernels.common.select import Impl, invalid, is_traced, select
from dbcache.kernels.common.sums import f32
from dbcache.kernels.decision.probe_diff import MAX_PARTIALS
from dbcache.kernels.decision.step_signal import (
    is_ready,
    is_signal_ready,
    is_summed,
    signal_of,
    signal_of_partials,
)
from dbcache.kernels.prediction.taylor import reached, store_weights, weights_by_slot


def decide(state: LaneState, partials: torch.Tensor | None, *, impl: Impl = "auto") -> None:
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
        impl: ``"triton"``, ``"reference"`` (Python on the host, any device), or ``"auto"``, which
            takes Triton for tensors on a GPU. An implementation asked for by name never falls back.

    The reference reads the state on the host, which synchronises if it is on a GPU; Triton does
    not.

    Raises:
        ValueError: `partials` does not fit.
        RuntimeError: the state has no room for the step (reference only; Triton decides it as
            DYNAMIC and leaves it out of the traces).
    """
    counters = state.counters
    if partials is not None:
        if (
            partials.ndim != 3
            or partials.shape[2] not in (2, 4)
            or partials.shape[1] > MAX_PARTIALS
        ):
            must = f"partials must be (B, T, 2 or 4) with T <= {MAX_PARTIALS}"
            raise invalid("decide", must, tuple(partials.shape))
        if partials.dtype != torch.float32 or partials.device != counters.device:
            must = f"partials must be float32 on {counters.device}"
            raise invalid("decide", must, partials.dtype, partials.device)
    if is_traced(counters):
        _decide_op(*state.tensors(), partials, impl)
    elif select(impl, counters) == "triton":
        _decide_triton(state, partials)
    else:
        decide_reference(state, partials)


def decide_reference(state: LaneState, partials: torch.Tensor | None) -> None:
    """Plain Python, the meaning of `decide`."""
    if state.host is None:
        on_cpu = state.clone("cpu")
        decide_reference(on_cpu, partials)
        state.copy_(on_cpu)
        return
    # NumPy views share the memory and are read and written in a fraction of a tensor's time
    counters_view, values_view, limits_view, thresholds, plan, trace_reason, trace_diff = state.host
    counters, values, limits = counters_view.tolist(), values_view.tolist(), limits_view.tolist()
    step = counters[ls.STEP]
    if step >= state.capacity:
        raise RuntimeError(
            f"decide: the step must be below the capacity of the state, {state.capacity}, "
            f"got {step}; call LaneState.grow"
        )
    code = int(plan[step])
    diff = None
    if partials is not None and code == PlanCode.DYNAMIC and counters[ls.REFERENCE] == 1:
        if is_ready(limits, values):
            diff = signal_of(partials.tolist(), limits, thresholds.tolist(), values)
    advance(counters, values, limits, thresholds.tolist(), code, diff)
    counters_view[:] = counters
    values_view[:] = values
    trace_reason[step] = counters[ls.REASON]
    trace_diff[step] = values[ls.DIFF]


def advance(
    counters: list[int],
    values: list[float],
    limits: Sequence[int],
    thresholds: Sequence[float],
    code: int,
    diff: float | None,
) -> None:
    """Advance `counters` and `values` by one step of plan code `code` whose change was `diff`."""
    reason = choose(counters, values, limits, thresholds, code, diff)
    step, slots, head = counters[ls.STEP], limits[ls.SLOTS], counters[ls.HEAD]
    cached = reason >= Reason.STATIC
    if cached:
        counters[ls.CACHED_STEPS] += 1
        counters[ls.CONSECUTIVE] += 1
        if diff is not None:
            values[ls.ACCUMULATED] = f32(values[ls.ACCUMULATED] + diff)
        # ages of the snapshots, newest first; the newest is in the slot before the head
        newest = ls.RING_STEPS + (head - 1) % slots
        steps = counters[newest : ls.RING_STEPS - 1 : -1]
        steps += counters[ls.RING_STEPS + slots - 1 : newest : -1]
        steps = steps[: counters[ls.SNAPSHOTS]]
        ages = tuple([step - s for s in steps])
        predictor, scale = limits[ls.PREDICTOR], thresholds[ls.SCALE]
        for base, order in (
            (ls.WEIGHTS, limits[ls.ORDER]),
            (ls.ENCODER_WEIGHTS, limits[ls.ENCODER_ORDER]),
        ):
            order = reached(steps, order, predictor)
            values[base : base + ls.MAX_SLOTS] = weights_by_slot(
                ages, order, head, slots, predictor, scale
            )
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


def choose(
    counters: Sequence[int],
    values: Sequence[float],
    limits: Sequence[int],
    thresholds: Sequence[float],
    code: int,
    diff: float | None,
) -> Reason:
    """Return what decides a step of plan code `code` whose change was `diff`."""
    if code == PlanCode.WARMUP:
        return Reason.WARMUP
    if code == PlanCode.MASK:
        return Reason.MASK
    reference, threshold = counters[ls.REFERENCE], thresholds[ls.THRESHOLD]
    missing = Reason.SHAPE_CHANGED if reference == 2 else Reason.NO_REFERENCE
    if code == PlanCode.STATIC:
        return Reason.STATIC if reference == 1 else missing
    if code >= ls.KNOWN:
        known = Reason(code - ls.KNOWN)
        return missing if known.cached and reference != 1 else known
    if counters[ls.CACHED_STEPS] >= limits[ls.MAX_CACHED] >= 0:
        return Reason.COUNT_LIMIT
    if counters[ls.CONSECUTIVE] >= limits[ls.MAX_CONSECUTIVE] >= 0:
        return Reason.CONSECUTIVE_LIMIT
    if values[ls.ACCUMULATED] >= thresholds[ls.MAX_ACCUMULATED] > 0:
        return Reason.ACCUMULATED_LIMIT
    if reference != 1 or not is_ready(limits, values):
        return missing
    if threshold <= 0:
        return Reason.THRESHOLD_OFF
    if diff is None or diff != diff:
        return Reason.NAN
    if limits[ls.SIGNAL] != Signal.CHANGE:
        diff = f32(values[ls.ACCUMULATED] + diff)
    elif threshold >= 1:
        return Reason.THRESHOLD_ALWAYS
    return Reason.BELOW_THRESHOLD if diff < threshold else Reason.ABOVE_THRESHOLD


def _decide_triton(state: LaneState, partials: torch.Tensor | None) -> None:
    samples, programs, width = (0, 0, 2) if partials is None else partials.shape
    log_lanes = max(0, programs - 1).bit_length()
    with torch.cuda.device_of(state.counters):
        _decide_kernel[(1,)](
            *state.tensors(), state.capacity,
            None if partials is None else partials.contiguous(), samples, programs,
            LOG_LANES=log_lanes, WIDTH=width,
            num_warps=1 if log_lanes < 8 else 4, enable_fp_fusion=False,
        )  # fmt: skip


@torch.library.custom_op(
    "dbcache::decide", mutates_args=("counters", "values", "trace_reason", "trace_diff")
)
def _decide_op(
    counters: torch.Tensor,
    values: torch.Tensor,
    limits: torch.Tensor,
    thresholds: torch.Tensor,
    plan: torch.Tensor,
    trace_reason: torch.Tensor,
    trace_diff: torch.Tensor,
    partials: torch.Tensor | None,
    impl: str,
) -> None:
    state = LaneState(counters, values, limits, thresholds, plan, trace_reason, trace_diff)
    if select(impl, counters) == "triton":
        _decide_triton(state, partials)
    else:
        decide_reference(state, partials)


# Triton functions can read globals that are constexpr, and no others
_STEP, _CACHED, _REASON = tl.constexpr(ls.STEP), tl.constexpr(ls.CACHED), tl.constexpr(ls.REASON)
_CACHED_STEPS, _CONSECUTIVE = tl.constexpr(ls.CACHED_STEPS), tl.constexpr(ls.CONSECUTIVE)
_REFERENCE, _SNAPSHOTS = tl.constexpr(ls.REFERENCE), tl.constexpr(ls.SNAPSHOTS)
_HEAD, _SLOT = tl.constexpr(ls.HEAD), tl.constexpr(ls.SLOT)
_RING_STEPS = tl.constexpr(ls.RING_STEPS)
_DIFF, _ACCUMULATED = tl.constexpr(ls.DIFF), tl.constexpr(ls.ACCUMULATED)
_WEIGHTS, _ENCODER_WEIGHTS = tl.constexpr(ls.WEIGHTS), tl.constexpr(ls.ENCODER_WEIGHTS)
_MAX_CACHED, _MAX_CONSECUTIVE = tl.constexpr(ls.MAX_CACHED), tl.constexpr(ls.MAX_CONSECUTIVE)
_SLOTS, _ORDER = tl.constexpr(ls.SLOTS), tl.constexpr(ls.ORDER)
_ENCODER_ORDER = tl.constexpr(ls.ENCODER_ORDER)
_THRESHOLD, _MAX_ACCUMULATED = tl.constexpr(ls.THRESHOLD), tl.constexpr(ls.MAX_ACCUMULATED)
_PREDICTOR, _SCALE = tl.constexpr(ls.PREDICTOR), tl.constexpr(ls.SCALE)
_KNOWN = tl.constexpr(ls.KNOWN)
_PLAN_DYNAMIC = tl.constexpr(int(PlanCode.DYNAMIC))
_PLAN_STATIC = tl.constexpr(int(PlanCode.STATIC))
_PLAN_WARMUP = tl.constexpr(int(PlanCode.WARMUP))
_PLAN_MASK = tl.constexpr(int(PlanCode.MASK))
_FULL_WARMUP, _FULL_MASK = tl.constexpr(int(Reason.WARMUP)), tl.constexpr(int(Reason.MASK))
_COUNT_LIMIT = tl.constexpr(int(Reason.COUNT_LIMIT))
_CONSECUTIVE_LIMIT = tl.constexpr(int(Reason.CONSECUTIVE_LIMIT))
_ACCUMULATED_LIMIT = tl.constexpr(int(Reason.ACCUMULATED_LIMIT))
_NO_REFERENCE = tl.constexpr(int(Reason.NO_REFERENCE))
_SHAPE_CHANGED = tl.constexpr(int(Reason.SHAPE_CHANGED))
_THRESHOLD_OFF, _NAN = tl.constexpr(int(Reason.THRESHOLD_OFF)), tl.constexpr(int(Reason.NAN))
_ABOVE_THRESHOLD = tl.constexpr(int(Reason.ABOVE_THRESHOLD))
_CACHED_STATIC = tl.constexpr(int(Reason.STATIC))
_BELOW_THRESHOLD = tl.constexpr(int(Reason.BELOW_THRESHOLD))
_THRESHOLD_ALWAYS = tl.constexpr(int(Reason.THRESHOLD_ALWAYS))


@triton.jit
def _decide_kernel(
    counters_ptr,
    values_ptr,
    limits_ptr,
    thresholds_ptr,
    plan_ptr,
    trace_reason_ptr,
    trace_diff_ptr,
    capacity,
    partials_ptr,
    samples,
    programs,
    LOG_LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    decide_once(
        counters_ptr, values_ptr, limits_ptr, thresholds_ptr, plan_ptr, trace_reason_ptr,
        trace_diff_ptr, capacity, partials_ptr, samples, programs, LOG_LANES, WIDTH,
    )  # fmt: skip


@triton.jit
def decide_once(
    counters_ptr,
    values_ptr,
    limits_ptr,
    thresholds_ptr,
    plan_ptr,
    trace_reason_ptr,
    trace_diff_ptr,
    capacity,
    partials_ptr,
    samples,
    programs,
    LOG_LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The function `decide_reference` above, for (samples, programs, WIDTH) partial sums.

    One program of a launch may run it, with programs <= 2**LOG_LANES.
    """
    MEASURED: tl.constexpr = partials_ptr is not None
    diff = tl.full((), -1.0, tl.float32)
    if MEASURED:
        diff = signal_of_partials(
            partials_ptr, samples, programs, limits_ptr, thresholds_ptr, values_ptr, LOG_LANES,
            WIDTH,
        )  # fmt: skip
    _advance(
        counters_ptr,
        values_ptr,
        limits_ptr,
        thresholds_ptr,
        plan_ptr,
        trace_reason_ptr,
        trace_diff_ptr,
        capacity,
        diff,
        MEASURED,
    )


@triton.jit
def _advance(
    counters_ptr,
    values_ptr,
    limits_ptr,
    thresholds_ptr,
    plan_ptr,
    trace_reason_ptr,
    trace_diff_ptr,
    capacity,
    diff,
    MEASURED: tl.constexpr,
):
    """The function `advance` above, on the state in memory."""
    step = tl.load(counters_ptr + _STEP)
    planned = step < capacity
    code = tl.load(plan_ptr + step, mask=planned, other=_PLAN_DYNAMIC)
    reference = tl.load(counters_ptr + _REFERENCE)
    ready = is_signal_ready(limits_ptr, values_ptr)
    measured = MEASURED & (code == _PLAN_DYNAMIC) & (reference == 1) & ready
    cached_steps = tl.load(counters_ptr + _CACHED_STEPS)
    consecutive = tl.load(counters_ptr + _CONSECUTIVE)
    accumulated = tl.load(values_ptr + _ACCUMULATED)
    reason = choose_once(
        limits_ptr, thresholds_ptr, code, reference, ready, cached_steps, consecutive, accumulated,
        diff, MEASURED,
    )  # fmt: skip
    cached = reason >= _CACHED_STATIC

    slots = tl.load(limits_ptr + _SLOTS)
    snapshots = tl.load(counters_ptr + _SNAPSHOTS)
    head = tl.load(counters_ptr + _HEAD)
    # every warp reads before the first one writes, or they would not take the same branch
    tl.debug_barrier()
    if cached:
        order = tl.load(limits_ptr + _ORDER)
        encoder_order = tl.load(limits_ptr + _ENCODER_ORDER)
        ring_ptr = counters_ptr + _RING_STEPS
        predictor = tl.load(limits_ptr + _PREDICTOR)
        scale = tl.load(thresholds_ptr + _SCALE)
        store_weights(
            values_ptr + _WEIGHTS, ring_ptr, step, head, slots, snapshots, order, predictor, scale
        )
        store_weights(
            values_ptr + _ENCODER_WEIGHTS, ring_ptr, step, head, slots, snapshots, encoder_order,
            predictor, scale,
        )  # fmt: skip
        tl.store(counters_ptr + _CACHED_STEPS, cached_steps + 1)
        tl.store(counters_ptr + _CONSECUTIVE, consecutive + 1)
        tl.store(values_ptr + _ACCUMULATED, accumulated + diff, mask=measured)
    else:
        tl.store(counters_ptr + _SLOT, head)
        tl.store(counters_ptr + _RING_STEPS + head, step)
        tl.store(counters_ptr + _HEAD, (head + 1) % slots)
        tl.store(counters_ptr + _SNAPSHOTS, tl.minimum(snapshots + 1, slots))
        tl.store(counters_ptr + _CONSECUTIVE, 0)
        tl.store(counters_ptr + _REFERENCE, 1)
        tl.store(values_ptr + _ACCUMULATED, 0.0)
    diff = tl.where(measured, diff, -1.0)
    tl.store(counters_ptr + _CACHED, cached.to(tl.int32))
    tl.store(counters_ptr + _REASON, reason)
    tl.store(values_ptr + _DIFF, diff)
    tl.store(trace_reason_ptr + step, reason, mask=planned)
    tl.store(trace_diff_ptr + step, diff, mask=planned)
    tl.store(counters_ptr + _STEP, step + 1)


@triton.jit
def choose_once(
    limits_ptr,
    thresholds_ptr,
    code,
    reference,
    ready,
    cached_steps,
    consecutive,
    accumulated,
    diff,
    MEASURED: tl.constexpr,
):
    """The function `choose` above, from the last rule to the first: a later line overrides."""
    max_cached = tl.load(limits_ptr + _MAX_CACHED)
    max_consecutive = tl.load(limits_ptr + _MAX_CONSECUTIVE)
    threshold = tl.load(thresholds_ptr + _THRESHOLD)
    max_accumulated = tl.load(thresholds_ptr + _MAX_ACCUMULATED)
    missing = tl.where(reference == 2, _SHAPE_CHANGED, _NO_REFERENCE)

    summed = is_summed(limits_ptr)
    compared = tl.where(summed, accumulated + diff, diff)
    reason = tl.where(compared < threshold, _BELOW_THRESHOLD, _ABOVE_THRESHOLD)
    reason = tl.where((threshold >= 1.0) & ~summed, _THRESHOLD_ALWAYS, reason)
    reason = tl.where((not MEASURED) | (diff != diff), _NAN, reason)
    reason = tl.where(threshold <= 0.0, _THRESHOLD_OFF, reason)
    reason = tl.where((reference == 1) & ready, reason, missing)
    over = (max_accumulated > 0.0) & (accumulated >= max_accumulated)
    reason = tl.where(over, _ACCUMULATED_LIMIT, reason)
    over = (max_consecutive >= 0) & (consecutive >= max_consecutive)
    reason = tl.where(over, _CONSECUTIVE_LIMIT, reason)
    over = (max_cached >= 0) & (cached_steps >= max_cached)
    reason = tl.where(over, _COUNT_LIMIT, reason)

    known = tl.where((code >= _KNOWN + _CACHED_STATIC) & (reference != 1), missing, code - _KNOWN)
    reason = tl.where(code >= _KNOWN, known, reason)
    static = tl.where(reference == 1, _CACHED_STATIC, missing)
    reason = tl.where(code == _PLAN_STATIC, static, reason)
    reason = tl.where(code == _PLAN_WARMUP, _FULL_WARMUP, reason)
    return tl.where(code == _PLAN_MASK, _FULL_MASK, reason)
