"""Measure the probe's change and take the step's decision, in one launch.

`probe_diff` followed by `decide`, bit for bit, without the second launch and the gap before it. The
program of the measurement that finishes last takes the decision:

    store the partial sums               each program, at its own place
    ticket += 1                          an atomic on ``counters[TICKET]``
    the last one:  ticket := 0,  add the partial sums in their fixed order,  decide

Which program comes last changes from run to run; what it reads and in which order it adds do not.
Only the ticket is atomic, and it counts integers.

Memory order: a barrier puts the stores of all threads of a program before its atomic, which
releases them (acq_rel, scope of the device). The atomic of the last program comes after all others
in the order of modifications of the ticket and acquires what they released; a barrier hands that on
to all threads. Before, a program writes nothing of the state but the ticket. The ticket is 0 again
at the end of the launch, which the next kernel on the stream sees; so a captured graph can be
replayed.
"""

import weakref

import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.checks import check_shared
from dbcache.kernels.common.lane_state import DECIDED, LANE, LaneState, State
from dbcache.kernels.common.launches import BLOCK, contiguous, launch_of
from dbcache.kernels.common.op import op
from dbcache.kernels.common.plans import REFERENCE, Plans
from dbcache.kernels.common.select import Impl
from dbcache.kernels.common.sums import MAX_LANES, Partials, log2, partition
from dbcache.kernels.decision.decide import decide_once, decide_sums
from dbcache.kernels.decision.probe_diff import (
    Probe,
    change_of_samples,
    check_probe,
    size_of_samples,
    store_partial,
    store_partial_by_token,
    sums_of_samples,
)


def probe_and_decide(
    h_in: Tensor | None,
    h_fn: Tensor,
    p_ref: Tensor,
    state: LaneState,
    *,
    by_token: bool = False,
    impl: Impl = "auto",
) -> None:
    """Do what ``decide(state, probe_diff(h_in, h_fn, p_ref))`` does, in one launch.

    Args:
        h_in: activations before the probe blocks, (B, ...), or None, as `probe_diff` takes them.
        h_fn: activations after the probe blocks, same shape, dtype and device.
        p_ref: probe residual of the last full step, same shape and device, one of the dtypes.
        state: state of the lane on the same device, with ``counters[STEP] < state.capacity``;
            advanced in place. One stream at a time may work on it.
        by_token: give `probe_diff` the thresholds of `state`, for the important tokens.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: the state has no room for the step (reference only), as in `decide`.
    """
    moving, kept = (h_fn, h_in), (p_ref, state.counters, state.plan, state.partials)
    found = LAUNCHES.find(impl, by_token, moving, kept)
    if found is REFERENCE:
        return probe_and_decide_reference(h_in, h_fn, p_ref, state, by_token)
    if found is not None:
        return found[0].launch(*found[1])
    check_probe("probe_and_decide", h_in, h_fn, p_ref, by_token)
    check_shared("probe_and_decide", "device", h_fn=h_fn, state=state.counters)
    LAUNCHES.note_checked(impl, by_token, moving, kept)
    return _probe_and_decide(impl, h_in, h_fn, p_ref, state, by_token)


def probe_and_decide_reference(
    h_in: Tensor | None, h_fn: Tensor, p_ref: Tensor, state: LaneState, by_token: bool = False
) -> None:
    """Plain PyTorch and Python, the meaning of `probe_and_decide`."""
    if by_token:
        sums = [x.tolist() for x in sums_of_samples(h_in, h_fn, p_ref, state.thresholds)]
    else:
        sums = [change_of_samples(h_in, h_fn, p_ref).tolist(), _size_of(p_ref, state)]
    decide_sums(state, [[sample] for sample in zip(*sums, strict=True)])


def _size_of(p_ref: Tensor, state: LaneState) -> list[float]:
    """Return ``sum|p_ref|`` of each sample, which `state` keeps until `p_ref` is written to."""
    version = None if p_ref.is_inference() else p_ref._version
    if version is not None and state.size is not None:
        known, at, size = state.size
        if known() is p_ref and at == version:
            return size
    size = size_of_samples(p_ref).tolist()
    if version is not None:
        state.size = weakref.ref(p_ref), version, size
    return size


LAUNCHES = Plans()


@op(probe_and_decide_reference, like="h_fn", mutates=DECIDED)
def _probe_and_decide(h_in, h_fn, p_ref, state, by_token):
    batch, sums = h_fn.shape[0], 4 if by_token else 2
    per_program, programs = partition(h_fn.shape, by_token)
    partials = state.room_for(batch * programs * sums)
    moving, kept = (h_fn, h_in), (p_ref, state.counters, state.plan, partials)
    h_in, h_fn, p_ref = contiguous(h_in, h_fn, p_ref)
    launch = launch_of("probe_and_decide tokens" if by_token else "probe_and_decide", h_fn)
    tail = {"size": h_fn.numel() // batch, "per_program": per_program, "width": h_fn.shape[-1]}
    tail |= {"LOG_BLOCK": log2(BLOCK), "LOG_LANES": log2(MAX_LANES), "WIDTH": sums}
    LAUNCHES.launch(
        by_token, moving, kept, _probe_and_decide_kernel, (programs, batch),
        (h_fn, h_in), (p_ref, *state.tensors(), state.capacity, partials), tail,
        num_warps=launch.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["per_program", "capacity"])
def _probe_and_decide_kernel(
    h_fn_ptr, h_in_ptr, p_ref_ptr,
    counters_ptr, values_ptr, limits_ptr, thresholds_ptr, plan_ptr, trace_reason_ptr,
    trace_diff_ptr, capacity, partials_ptr, size, per_program, width,
    LOG_BLOCK: tl.constexpr, LOG_LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    probe = Probe(h_in_ptr, h_fn_ptr, p_ref_ptr, partials_ptr, size, per_program, width)
    if WIDTH == 2:
        store_partial(probe, LOG_BLOCK)
    else:
        store_partial_by_token(probe, thresholds_ptr, LOG_BLOCK)
    tl.debug_barrier()
    programs, samples = tl.num_programs(0), tl.num_programs(1)
    before = tl.atomic_add(counters_ptr + LANE.TICKET, 1, sem="acq_rel", scope="gpu")
    if before == programs * samples - 1:
        tl.debug_barrier()
        tl.store(counters_ptr + LANE.TICKET, 0)
        state = State(
            counters_ptr, values_ptr, limits_ptr, thresholds_ptr, plan_ptr, trace_reason_ptr,
            trace_diff_ptr, capacity,
        )  # fmt: skip
        decide_once(state, Partials(partials_ptr, samples, programs), LOG_LANES, WIDTH)
