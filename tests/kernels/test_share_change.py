import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import BatchReduce, PlanCode
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.decision.share_change import PROGRAMS, make_stamps, share_change
from dbcache.kernels.pruning.block_state import BlockSteps
from dbcache.kernels.pruning.decide_step import decide_step

IMPLS = ["triton", "reference"]
SIZES = [1, 1023, PROGRAMS * 1024 + 3]


def lane_at(
    step, device, *, codes=None, reference=1, threshold=0.1, limits=(-1, -1), counts=(0, 0)
):
    state = ls.LaneState.allocate(8, device)
    if codes is not None:
        state.plan.copy_(torch.tensor(codes, dtype=torch.int32))
    state.counters[ls.STEP], state.counters[ls.REFERENCE] = step, reference
    state.counters[ls.CACHED_STEPS], state.counters[ls.CONSECUTIVE] = counts
    state.thresholds[ls.THRESHOLD] = threshold
    state.limits[:2] = torch.tensor(limits, dtype=torch.int32)
    return state


class Shared:
    """A buffer and its stamps; each call is a step of a branch, told by what it comes back with."""

    def __init__(self, impl, device, size=2):
        self.impl, self.device, self.size = impl, device, size
        self.stamps = make_stamps(device)
        self.kept = torch.full((size,), math.nan, device=device)  # never to be seen

    def __call__(self, value, branch, state, kind=0, **options):
        own = torch.full((self.size,), float(value), device=self.device)
        before = [x.clone() for x in state.tensors()]
        share_change(own, self.kept, self.stamps, state, branch, kind, impl=self.impl, **options)
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before, strict=True))
        assert (own == own[0]).all()
        return own[0].item()


@pytest.fixture(params=IMPLS)
def shared(request, device):
    return lambda size=2: Shared(request.param, device, size)


@pytest.mark.parametrize("size", SIZES)
def test_the_other_branches_of_a_step_get_what_the_first_measured(shared, size, device):
    share = shared(size)
    for step in (1, 2):
        state = lane_at(step, device)
        assert share(10 * step, 0, state) == 10 * step
        assert share(7, 1, state) == 10 * step
        assert share(8, 2, state) == 10 * step
        assert (share.kept == 10 * step).all()
        assert share.stamps.tolist() == [[0, step, 0]] * PROGRAMS


def test_its_own_change_and_that_of_another_step_or_kind_is_not_taken_over(shared, device):
    share, state = shared(), lane_at(3, device)
    assert share(1, 0, state) == 1
    assert share(2, 0, state) == 2  # a step that was begun anew
    assert share(3, 1, state, kind=1) == 3
    assert share(4, 0, state) == 4  # what is kept is of another kind now
    assert share(5, 1, state) == 4
    assert share(6, 1, lane_at(2, device)) == 6


@pytest.mark.parametrize("code", [PlanCode.WARMUP, PlanCode.MASK, PlanCode.STATIC, ls.KNOWN + 9])
def test_a_step_that_the_plan_decides_keeps_nothing(shared, device, code):
    share, state = shared(), lane_at(2, device, codes=[code] * 8)
    assert share(1, 0, state) == 1
    assert share(2, 1, state) == 2
    assert share.kept.isnan().all()


@pytest.mark.parametrize("reference", [0, 2])
def test_a_branch_that_cannot_compare_leaves_what_is_kept(shared, device, reference):
    share, lost = shared(), lane_at(4, device, reference=reference)
    assert share(1, 0, lost) == 1
    assert share.kept.isnan().all()
    assert share(2, 1, lane_at(4, device)) == 2
    assert share(3, 0, lost) == 2  # nobody looks at it
    assert share(4, 2, lane_at(4, device)) == 2


def test_a_new_request_forgets(shared, device):
    share, state = shared(), lane_at(4, device)
    share(1, 0, state)
    share.stamps.fill_(-1)
    assert share(2, 1, state) == 2


@pytest.mark.parametrize(
    "settled",
    [
        {"limits": (3, -1), "counts": (3, 0)},
        {"limits": (-1, 2), "counts": (2, 2)},
        {"threshold": 0.0},
    ],
)
def test_where_rules_come_first_they_close_a_step(shared, device, settled):
    state = lane_at(4, device, **settled)
    share = shared()
    assert share(1, 0, state, by_rules=True) == 1
    assert share(2, 1, lane_at(4, device), by_rules=True) == 2
    share = shared()
    assert share(1, 0, state) == 1
    assert share(2, 1, lane_at(4, device)) == 1


def test_a_step_beyond_the_plan_is_open(shared, device):
    share, state = shared(), lane_at(8, device, codes=[PlanCode.MASK] * 8)
    assert share(1, 0, state) == 1
    assert share(2, 1, state) == 1


CODES = [PlanCode.DYNAMIC] * 5 + [PlanCode.WARMUP, PlanCode.MASK, PlanCode.STATIC]


@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_triton_and_python_agree_bit_for_bit(data):
    """And what is kept is what `decide` and `decide_step` look at."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw, by_rules = data.draw, data.draw(st.booleans())
    size = draw(st.sampled_from([1, 5, 1500]))
    both = [Shared(impl, device, size) for impl in IMPLS]
    for value in range(draw(st.integers(1, 8))):
        counts = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
        state = lane_at(
            draw(st.integers(2, 3)),
            device,
            codes=[draw(st.sampled_from(CODES))] * 8,
            reference=draw(st.integers(0, 2)),
            threshold=draw(st.sampled_from([0.0, 0.1, 1.0])),
            limits=draw(st.tuples(st.integers(-1, 3), st.integers(-1, 3))),
            counts=counts,
        )
        branch, kind = draw(st.integers(0, 2)), draw(st.integers(0, 1))
        whose, *of = both[0].stamps[0].tolist()
        is_taken = whose != branch and of == [int(state.counters[ls.STEP]), kind]
        got = [share(value, branch, state, kind, by_rules=by_rules) for share in both]
        assert got[0] == got[1]
        assert torch.equal(both[0].stamps, both[1].stamps)
        assert torch.equal(both[0].kept.nan_to_num(-9), both[1].kept.nan_to_num(-9))
        assert is_taken or got[0] == value
        if not is_taken:
            assert (both[0].kept[0].item() == value) == _is_looked_at(state, by_rules)


def _is_looked_at(state, by_rules):
    """Whether the decision of the step notes a change that it was given."""
    device = state.counters.device
    if by_rules:
        steps = BlockSteps.allocate(8, [True], device)
        ls.LaneState(*steps.tensors()[:7]).copy_(state)
        decide_step(steps, torch.tensor([[0.5, 0.0]], device=device))
        return steps.values[ls.DIFF].item() == 0.5
    state = state.clone()
    assert state.limits[ls.BATCH_REDUCE] == BatchReduce.MEAN
    decide(state, torch.tensor([[[1.0, 2.0]]], device=device))
    return state.values[ls.DIFF].item() == 0.5


def test_rejects_what_does_not_fit(device):
    own, stamps, state = torch.ones(2, 3, device=device), make_stamps(device), lane_at(1, device)
    for kept in (torch.ones(6, device=device), own.double(), torch.ones(3, 2, device=device).T):
        with pytest.raises(ValueError, match=r"kept must be contiguous float32 \(2, 3\), got"):
            share_change(own, kept, stamps, state, 0, 0)
    with pytest.raises(ValueError, match=r"stamps must be int32 \(16, 3\), got"):
        share_change(own, own.clone(), stamps[:3], state, 0, 0)
    with pytest.raises(ValueError, match="must be on one device, got"):
        share_change(own, own.to("meta"), stamps, state, 0, 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("by_rules", [False, True])
def test_the_op_is_registered_as_it_behaves(device, impl, by_rules):
    own, kept = torch.rand(1, 3, 2, device=device), torch.rand(1, 3, 2, device=device)
    state = lane_at(1, device).tensors()
    op = torch.ops.dbcache.share_change.default
    torch.library.opcheck(op, (own, kept, make_stamps(device), *state, 0, 0, by_rules, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_it_compiles_without_graph_breaks(device, impl):
    kept, stamps, state = torch.zeros(3, device=device), make_stamps(device), lane_at(1, device)

    @torch.compile(fullgraph=True, backend="eager")
    def run(own, branch):
        share_change(own, kept, stamps, state, branch, 0, impl=impl)
        return own

    assert run(torch.ones(3, device=device), 0).tolist() == [1, 1, 1]
    assert run(torch.zeros(3, device=device), 1).tolist() == [1, 1, 1]
