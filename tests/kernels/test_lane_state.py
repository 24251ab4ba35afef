import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState, PlanCode, Reason


def test_entries_do_not_overlap():
    assert ls.RING_STEPS == ls.SLOT + 1
    assert (ls.RATE, ls.WEIGHTS, ls.ENCODER_WEIGHTS, ls.NUM_VALUES) == (2, 4, 12, 20)
    assert (ls.TICKET, ls.NUM_COUNTERS) == (17, 18)


def test_a_new_state_never_caches_and_has_no_reference(device):
    state = LaneState.allocate(3, device)
    assert state.capacity == 3
    assert state.counters.tolist() == [0] * ls.NUM_COUNTERS
    # neither a diff nor a rate yet
    assert state.values.tolist() == [-1.0, 0.0, -1.0] + [0.0] * (ls.NUM_VALUES - 3)
    assert state.limits.tolist() == [-1, -1, 1] + [0] * (ls.NUM_LIMITS - 3)
    assert state.thresholds.tolist() == [0.0] * ls.NUM_THRESHOLDS
    assert state.plan.tolist() == [PlanCode.DYNAMIC] * 3
    assert state.trace_reason.tolist() == [-1] * 3
    assert state.trace_diff.tolist() == [-1.0] * 3


def test_weights_are_views_of_values_at_multiples_of_16_bytes(device):
    state = LaneState.allocate(1, device)
    state.values.copy_(torch.arange(ls.NUM_VALUES))
    assert state.weights.tolist() == list(range(4, 12))
    assert all(x.data_ptr() % 16 == 0 for x in (state.weights, state.encoder_weights))
    assert state.encoder_weights.tolist() == list(range(12, 20))


@pytest.mark.parametrize("copied", [copy.deepcopy, LaneState.clone])
def test_a_copy_shares_nothing_and_keeps_its_views(device, copied):
    state = LaneState.allocate(2, device)
    other = copied(state)
    other.values.fill_(5)
    other.plan.fill_(PlanCode.MASK)
    assert other.weights.tolist() == [5.0] * 8
    assert other.host is None or other.host[1].tolist() == other.values.tolist()
    assert state.weights.tolist() == [0.0] * 8
    assert state.plan.tolist() == [0, 0]


def grown(state):
    state.grow(5)
    return state


@pytest.mark.parametrize(
    "origin", [LaneState.allocate, LaneState.clone, copy.deepcopy, grown],
    ids=["new", "clone", "deep copy", "grown"],
)  # fmt: skip
def test_reset_keeps_the_plan_and_the_configuration(device, origin):
    state = LaneState.allocate(3, device)
    if origin != LaneState.allocate:
        state = origin(state)
    fresh, before = LaneState.allocate(state.capacity, device), state.addresses()
    for own, value in ((state.plan, 2), (state.limits, 3), (state.thresholds, 0.5)):
        own.fill_(value)
    for name in ("counters", "values", "trace_reason", "trace_diff"):
        getattr(state, name).fill_(7)
    state.reset()
    for name in ("counters", "values", "trace_reason", "trace_diff"):
        assert torch.equal(getattr(state, name), getattr(fresh, name)), name
    assert state.addresses() == before
    assert state.plan.tolist() == [2] * state.capacity
    assert state.limits.tolist() == [3] * ls.NUM_LIMITS
    assert state.thresholds.tolist() == [0.5] * ls.NUM_THRESHOLDS


class _Ops(TorchDispatchMode):
    """Writes down the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_reset_is_one_op_on_tensors_of_one_dtype(device):
    """PyTorch copies lists of one dtype in one launch; others tensor by tensor."""
    state = LaneState.allocate(3, device)
    with _Ops() as ops:
        state.reset()
    assert ops.names == ["aten._foreach_copy_.default"]
    assert {x.dtype for copied in state._reset for x in copied} == {torch.int32}


def test_grow_keeps_the_contents_and_never_shrinks(device):
    state = LaneState.allocate(2, device)
    state.plan.fill_(PlanCode.MASK)
    state.trace_reason.fill_(Reason.MASK)
    state.trace_diff.fill_(0.5)
    state.grow(4)
    assert state.plan.tolist() == [3, 3, 0, 0]
    assert state.trace_reason.tolist() == [1, 1, -1, -1]
    assert state.trace_diff.tolist() == [0.5, 0.5, -1.0, -1.0]
    assert state.plan.dtype == state.trace_reason.dtype == torch.int32
    plan = state.plan
    state.grow(3)
    assert state.plan is plan


def test_invalidate_forgets_the_reference_and_the_ring_only(device):
    state = LaneState.allocate(2, device)
    state.counters.copy_(torch.arange(20, 20 + ls.NUM_COUNTERS))
    state.invalidate()
    expected = list(range(20, 20 + ls.NUM_COUNTERS))
    expected[ls.REFERENCE], expected[ls.SNAPSHOTS], expected[ls.HEAD] = 2, 0, 0
    assert state.counters.tolist() == expected


def test_rejects_no_capacity():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        LaneState.allocate(0, "cpu")


def test_reasons_know_whether_the_step_was_cached():
    cached = {reason.name for reason in Reason if reason.cached}
    assert cached == {"STATIC", "BELOW_THRESHOLD", "THRESHOLD_ALWAYS"}
