"""Measure and decide for all rows of a batch, each with a lane of its own, in one launch.

`probe_and_decide` of each row whose plan leaves the step to its change and that has a reference,
and ``decide(state, None)`` of the others, bit for bit. Which of them a row is, its programs read
from its own state; they take a ticket of their row either way, and the last one decides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.by_row.table import TABLE, Rows, address, has_lane, kind_of, state_of
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LANE, PlanCode
from dbcache.kernels.common.launches import BLOCK, contiguous, launch_of
from dbcache.kernels.common.plans import Plans
from dbcache.kernels.common.select import Impl, select
from dbcache.kernels.common.sums import MAX_LANES, Partials, log2, partition
from dbcache.kernels.decision.decide import counts_of, decide_once, decide_reference, is_undecided
from dbcache.kernels.decision.probe_and_decide import probe_and_decide_reference
from dbcache.kernels.decision.probe_diff import (
    Probe,
    check_probe,
    store_partial,
    store_partial_by_token,
)


def decide_rows(
    h_in: Tensor | None,
    h_fn: Tensor,
    rows: Rows,
    *,
    measures: bool = True,
    by_token: bool = False,
    impl: Impl = "auto",
) -> Tensor | None:
    """Decide the next step of each row's lane, by the change of the row where that decides.

    Args:
        h_in: activations before the probe blocks, (B, ...), or None, as `probe_diff` takes them.
        h_fn: activations after the probe blocks, same shape, dtype and device.
        rows: B lanes; a `p_ref` where the state has a reference. The states are advanced in place.
            One stream at a time may work on them.
        measures: False: nothing is measured, as the plans decide for all rows.
        by_token: measure important tokens, as in `probe_and_decide`.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    Returns:
        int32 (B,) on the device, for one read by the host: 1 where a row is cached, 0 where it runs
        in full, anything where it has no lane. None if `measures` is False.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: a state has no room for the step (reference only), as in `decide`.
    """
    measures = measures and rows.first.p_ref is not None
    if select(impl, h_fn) == "reference":
        _check(h_in, h_fn, rows, measures, by_token)
        return decide_rows_reference(h_in, h_fn, rows, measures, by_token)
    tensors = h_fn, rows.table(), h_in if measures else None
    found = LAUNCHES.find(impl, (measures, by_token, rows.form, h_fn.shape), tensors)
    if found is not None:
        plan, addresses = found
        scratch = None if plan.scratch is None else torch.empty_like(plan.scratch)
        plan.launch(None if scratch is None else scratch.data_ptr(), *addresses)
        return _flags(scratch, rows)
    _check(h_in, h_fn, rows, measures, by_token)
    with torch.cuda.device_of(h_fn):
        return _flags(_launch(tensors, rows, measures, by_token), rows)


def _flags(scratch: Tensor | None, rows: Rows) -> Tensor | None:
    """Return the decisions, which lie behind the partial sums."""
    return None if scratch is None else scratch[-len(rows) :].view(torch.int32)


def decide_rows_reference(
    h_in: Tensor | None, h_fn: Tensor, rows: Rows, measures: bool, by_token: bool
) -> Tensor | None:
    """Plain PyTorch and Python, the meaning of `decide_rows`."""
    for at, row in rows.each():
        state = row.state
        counters, plan = state.counters.tolist(), state.plan.tolist()
        code = plan[counters[ls.STEP]] if counters[ls.STEP] < len(plan) else PlanCode.DYNAMIC
        if measures and code == PlanCode.DYNAMIC and counters[ls.REFERENCE] == 1:
            assert row.p_ref is not None
            before = None if h_in is None else h_in[at]
            probe_and_decide_reference(before, h_fn[at], row.p_ref, state, by_token)
        else:
            decide_reference(state, None)
    flags = [row is not None and row.is_cached() for row in rows.rows]
    return torch.tensor(flags, dtype=torch.int32, device=h_fn.device) if measures else None


def _check(h_in, h_fn, rows, measures, by_token):
    """Raise a ValueError unless the batch fits the first lane, as all others do."""
    first = rows.check("decide_rows", h_fn)
    if measures:
        before = h_in if h_in is None else h_in[:1]
        rows.check("decide_rows", h_fn if h_in is None else h_in)
        check_probe("decide_rows", before, h_fn[:1], first.p_ref, by_token)


LAUNCHES = Plans()

REGISTERS = 72
"""Most registers of a thread for elements of 2 bytes, so that seven programs fit on an NVIDIA
multiprocessor. Triton 3.6 would take 79; nothing spills, but with offsets of 64 bits it would."""


def _launch(tensors, rows, measures, by_token):
    h_fn, table, h_in = tensors
    h_fn, h_in = contiguous(h_fn, h_in)
    shape, sums = h_fn[:1].shape, 4 if by_token else 2
    per_program, programs = partition(shape, by_token) if measures else (0, 1)
    scratch = None
    if measures:  # the partial sums, and a decision per row
        size = len(rows) * (programs * sums + 1)
        scratch = torch.empty(size, device=h_fn.device, dtype=torch.float32)
    launch = launch_of("probe_and_decide tokens" if by_token else "probe_and_decide", h_fn[:1])
    tail = {"size": shape.numel(), "per_program": per_program, "width": shape[-1]}
    tail |= {"LOG_BLOCK": log2(BLOCK), "LOG_LANES": log2(MAX_LANES), "WIDTH": sums}
    tail |= {"P_REF": kind_of(rows.first.p_ref)}
    is_limited = h_fn.itemsize == 2 and shape.numel() < 2**31 and not by_token
    is_limited &= torch.version.hip is None
    options = {"maxnreg": REGISTERS} if is_limited else {}
    LAUNCHES.launch(
        (measures, by_token, rows.form, h_fn.shape), tensors, (), _decide_rows_kernel,
        (programs, len(rows)), (scratch, h_fn, table, h_in), (), tail, scratch,
        num_warps=launch.num_warps, enable_fp_fusion=False, **options,
    )  # fmt: skip
    return scratch


@triton.jit(do_not_specialize=["per_program"])
def _decide_rows_kernel(
    partials_ptr, h_fn_ptr, table_ptr, h_in_ptr, size, per_program, width,
    LOG_BLOCK: tl.constexpr, LOG_LANES: tl.constexpr, WIDTH: tl.constexpr, P_REF: tl.constexpr,
):  # fmt: skip
    """A row of the grid is one of the batch: what `_probe_and_decide_kernel` is for a lane."""
    row, programs = tl.program_id(1), tl.num_programs(0)
    if has_lane(table_ptr, row):
        row_partials_ptr = None
        if partials_ptr is not None:
            row_partials_ptr = partials_ptr + row * programs * WIDTH
            if _is_undecided(table_ptr, row):
                # the sums are taken at the row's place in a batch; its reference has one row
                before = row.to(tl.int64) * size
                p_ref_ptr = address(table_ptr, row, TABLE.P_REF, P_REF) - before
                probe = Probe(h_in_ptr, h_fn_ptr, p_ref_ptr, partials_ptr, size, per_program, width)
                if WIDTH == 2:
                    store_partial(probe, LOG_BLOCK)
                else:
                    thresholds_ptr = address(table_ptr, row, TABLE.THRESHOLDS, tl.float32)
                    store_partial_by_token(probe, thresholds_ptr, LOG_BLOCK)
        tl.debug_barrier()
        # read anew, or the line would fill registers while the sums are taken
        ticket_ptr = address(table_ptr, row, TABLE.COUNTERS, tl.int32) + LANE.TICKET
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.debug_barrier()
            tl.store(ticket_ptr, 0)
            state = state_of(table_ptr, row)
            decide_once(state, Partials(row_partials_ptr, 1, programs), LOG_LANES, WIDTH)
            if partials_ptr is not None:
                tl.debug_barrier()
                flags_ptr = partials_ptr + tl.num_programs(1) * programs * WIDTH
                cached = tl.load(state.counters_ptr + LANE.CACHED)
                tl.store(flags_ptr + row, cached.to(tl.float32, bitcast=True))


@triton.jit
def _is_undecided(table_ptr, row):
    """Whether the change of a row decides its step."""
    state = state_of(table_ptr, row)
    return is_undecided(counts_of(state, tl.load(state.counters_ptr + LANE.STEP)))
