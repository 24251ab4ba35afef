"""Weights from a table, for the snapshots that they were made for and for no others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.config.scheduled_lane import ScheduledLane
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState, PlanCode
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.prediction.scheduled_weights import scheduled_weights

IMPLS = ["triton", "reference"]


def run(mask, plan, table, slots, impl, device):
    """Return per cached step what `decide` computed, what is there after, and the ring's steps."""
    state = LaneState.allocate(len(mask) + 4, device)
    state.limits[ls.SLOTS] = slots
    state.limits[ls.ORDER] = state.limits[ls.ENCODER_ORDER] = 1
    state.plan.copy_(torch.tensor(plan + [PlanCode.WARMUP] * (state.capacity - len(plan))))
    found = []
    for _ in mask:
        decide(state, None, impl="reference")
        if int(state.counters[ls.CACHED]):
            before = state.values.clone()
            scheduled_weights(state, table, impl=impl)
            numbers = state.counters.tolist()
            ring = {numbers[ls.RING_STEPS + i]: i for i in range(numbers[ls.SNAPSHOTS])}
            found.append((before, state.values.clone(), ring))
    return found


@settings(max_examples=20, deadline=None)
@given(st.data())
@pytest.mark.parametrize("impl", IMPLS)
def test_each_weight_goes_to_the_slot_of_its_step(device, impl, data):
    slots = data.draw(st.integers(3, 8))
    mask = [1, *data.draw(st.lists(st.integers(0, 1), min_size=4, max_size=14))]
    lane = ScheduledLane(tuple(mask))
    weights = {
        call: tuple(float(call + 0.25 * j) for j in range(len(lane.ring_at(call, slots))))
        for call, full in enumerate(mask)
        if not full and call % 3
    }
    lane = ScheduledLane(tuple(mask), weights)
    table = torch.tensor(lane.table(slots), device=device)
    plan = [PlanCode.MASK if full else PlanCode.STATIC for full in mask]
    cached = [call for call, full in enumerate(mask) if not full]
    for call, (before, after, ring) in zip(
        cached, run(mask, plan, table, slots, impl, device), strict=True
    ):
        if call not in weights:
            assert torch.equal(before, after)
            continue
        for base in (ls.WEIGHTS, ls.ENCODER_WEIGHTS):
            got = after[base : base + 8].tolist()
            expected = [0.0] * 8
            for step, weight in zip(lane.ring_at(call, slots), weights[call], strict=True):
                expected[ring[step]] = weight
            assert got == expected


@pytest.mark.parametrize("impl", IMPLS)
def test_another_ring_and_steps_beyond_the_table_keep_the_weights(device, impl):
    lane = ScheduledLane((1, 1, 0, 1, 0), {2: (1.5, -0.5), 4: (9.0, 0.0, -8.0)})
    table = torch.tensor(lane.table(4), device=device)
    full, cached = PlanCode.MASK, PlanCode.STATIC
    plan = [full, full, full, cached, cached, cached]  # the guard ran step 2; 3 is cached instead
    for before, after, _ in run([1] * 6, plan, table, 4, impl, device):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    "table", [torch.zeros(3, 8), torch.zeros(3, 16).double(), torch.zeros(16, 3).T, torch.zeros(16)]
)
def test_tables_of_another_form_are_refused(table):
    with pytest.raises(ValueError, match="table must be contiguous float32"):
        scheduled_weights(LaneState.allocate(4, "cpu"), table)
