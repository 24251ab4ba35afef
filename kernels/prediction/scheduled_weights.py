"""Weights that were fitted beforehand, for the very snapshots that a schedule leaves in the ring.

    weights[slot of full step s_m] = table[step, m]      if the ring holds the steps table[step, 8:]

A table has a row per step: 8 weights, newest snapshot first, and the 8 steps of the snapshots that
they are for, -1 where there is none. If the ring holds other steps, since a step ran in full that
the schedule caches, the weights that `decide` has computed stay.
"""

import torch
import triton
import triton.language as tl

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LANE, MAX_SLOTS, LaneState
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import Impl, invalid


def scheduled_weights(state: LaneState, table: torch.Tensor, *, impl: Impl = "auto") -> None:
    """Overwrite the weights of the cached step that `decide` has just decided, in place.

    Args:
        state: state of the lane, after `decide` and before the next step.
        table: float32 (steps, 16), contiguous, on the state's device. Steps beyond it keep the
            weights that there are.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the state on the host, which synchronises if it is on a GPU; Triton does
    not.

    Raises:
        ValueError: the table does not fit the interface.
    """
    counters = state.counters
    fits = table.ndim == 2 and table.shape[1] == 2 * MAX_SLOTS and table.is_contiguous()
    if not fits or table.dtype != torch.float32 or table.device != counters.device:
        must = f"table must be contiguous float32 (steps, {2 * MAX_SLOTS}) on {counters.device}"
        raise invalid("scheduled_weights", must, table.dtype, tuple(table.shape), table.device)
    _scheduled_weights(impl, state, table)


def scheduled_weights_reference(state: LaneState, table: torch.Tensor) -> None:
    """Plain Python, the meaning of `scheduled_weights`."""
    numbers, slots = state.counters.tolist(), state.limits.tolist()[ls.SLOTS]
    step = numbers[ls.STEP] - 1
    if step >= len(table):
        return
    row = table[step].tolist()
    planned = [int(s) for s in row[MAX_SLOTS:] if s >= 0]
    if not planned or planned != ls.steps_newest_first(numbers, slots)[: len(planned)]:
        return
    for into in (state.weights, state.encoder_weights):
        ls.write_weights(into, row[: len(planned)], numbers[ls.HEAD], slots)


@op(scheduled_weights_reference, like="state.counters", mutates=("values",))
def _scheduled_weights(state, table):
    args = (state.counters, state.values, state.limits, table, table.shape[0])
    _scheduled_weights_kernel[(1,)](*args, num_warps=1)


@triton.jit(do_not_specialize=["rows"])
def _scheduled_weights_kernel(counters_ptr, values_ptr, limits_ptr, table_ptr, rows):
    slots = tl.load(limits_ptr + LANE.SLOTS)
    step, snapshots = tl.load(counters_ptr + LANE.STEP) - 1, tl.load(counters_ptr + LANE.SNAPSHOTS)
    newest = tl.load(counters_ptr + LANE.HEAD) - 1 + 2 * LANE.MAX_SLOTS * slots
    m = tl.arange(0, LANE.MAX_SLOTS)
    slot = (newest - m) % slots
    is_there = (m < snapshots) & (m < slots)
    held = tl.load(counters_ptr + LANE.RING_STEPS + slot, mask=is_there, other=-1)
    has_row = step < rows
    row_ptr = table_ptr + tl.where(has_row, step, 0) * (2 * LANE.MAX_SLOTS)
    weights = tl.load(row_ptr + m)
    planned = tl.load(row_ptr + LANE.MAX_SLOTS + m).to(tl.int32)
    is_planned = planned >= 0
    wrong = tl.sum((is_planned & (planned != held)).to(tl.int32), axis=0)
    count = tl.sum(is_planned.to(tl.int32), axis=0)
    if has_row & (wrong == 0) & (count > 0):
        weights = tl.where(is_planned, weights, 0.0)
        target = tl.where(m < slots, slot, m)
        tl.store(values_ptr + LANE.WEIGHTS + target, weights)
        tl.store(values_ptr + LANE.ENCODER_WEIGHTS + target, weights)
