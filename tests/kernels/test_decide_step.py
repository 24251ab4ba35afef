import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import PlanCode, Reason
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.block_state import BlockSteps
from dbcache.kernels.pruning.decide_step import decide_step

IMPLS = ["triton", "reference"]
NAN = math.nan
PLAN = {"w": PlanCode.WARMUP, "m": PlanCode.MASK, "?": PlanCode.DYNAMIC, "s": PlanCode.STATIC}
PLAN |= {"b": ls.KNOWN + Reason.BELOW_THRESHOLD, "a": ls.KNOWN + Reason.ABOVE_THRESHOLD}


def steps_of(plan, prunable, device, *, threshold=0.1, limits=(-1, -1), every=1):
    state = BlockSteps.allocate(len(plan), prunable, device)
    state.plan.copy_(torch.tensor([PLAN[code] for code in plan], dtype=torch.int32))
    state.thresholds[ls.THRESHOLD] = threshold
    state.limits[: len(limits)] = torch.tensor(limits, dtype=torch.int32)
    state.store[bs.EVERY] = every
    return state


def contents(state):
    """Return all tensors of a state, bit by bit."""
    bits = {}
    for name in (*ls.TENSORS, "prunable", "flags", "store", "trace"):
        x = getattr(state, name)
        if x.is_floating_point():
            x = torch.where(x.isnan(), NAN, x).view(torch.int32)
        bits[name] = x.clone()
    return bits


class Run:
    """Steps by hand: what is left out, why, and what is stored."""

    def __init__(self, impl, device, plan, prunable=(1, 0, 1), **options):
        self.impl, self.device = impl, device
        self.state = steps_of(plan, [bool(may) for may in prunable], device, **options)

    def __call__(self, *pairs):
        """Decide a step by (change, left out) of each block; return it in words."""
        decisions = torch.tensor(pairs, device=self.device) if pairs else None
        decide_step(self.state, decisions, impl=self.impl)
        left_out = "".join("Cp"[flag] for flag in self.state.flags.tolist())
        reason = Reason(self.state.counters[ls.REASON].item()).name
        return left_out, reason, self.state.store[bs.DUE].item()


@pytest.fixture(params=IMPLS)
def run(request, device):
    return lambda *args, **options: Run(request.param, device, *args, **options)


SOME = ((0.05, 1.0), (0.01, 0.0), (0.3, 0.0))
NONE = ((0.2, 0.0), (0.01, 0.0), (0.3, 0.0))


def test_the_changes_decide_where_no_rule_does(run):
    steps = run("w?????m?")
    assert steps(*SOME) == ("CCC", "WARMUP", 1)
    assert steps(*SOME) == ("pCC", "BELOW_THRESHOLD", 2)
    assert steps(*NONE) == ("CCC", "ABOVE_THRESHOLD", 2)
    assert steps(*[(NAN, 0.0)] * 3) == ("CCC", "NAN", 2)
    assert steps((NAN, 0.0), (0.5, 0.0), (NAN, 0.0)) == ("CCC", "ABOVE_THRESHOLD", 2)
    assert steps() == ("CCC", "NAN", 2)
    assert steps(*SOME) == ("CCC", "MASK", 2)
    assert steps((NAN, 0.0), (0.01, 0.0), (0.3, 1.0)) == ("CCp", "BELOW_THRESHOLD", 2)
    state = steps.state
    # of the blocks that may be left out; -1 where nothing was measured
    expected = [-1.0, 0.05, 0.2, NAN, NAN, -1.0, -1.0, 0.3]
    got = state.trace_diff
    assert torch.equal(got.nan_to_num(7.0), torch.tensor(expected).to(got).nan_to_num(7.0))
    assert state.trace[[1, 2, 7]].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert state.trace_reason[0].item() == Reason.WARMUP
    assert state.counters[ls.STEP].item() == 8
    assert state.counters[ls.CACHED_STEPS].item() == 2


def test_a_static_step_leaves_out_all_that_may_be(run):
    steps = run("sws")
    assert steps() == ("CCC", "NO_REFERENCE", 1)
    assert steps() == ("CCC", "WARMUP", 2)
    assert steps(*NONE) == ("pCp", "STATIC", 2)


def test_limits_count_steps_on_which_a_block_is_left_out(run):
    steps = run("w???????", limits=(3, 2))
    reasons = [steps(*SOME)[1] for _ in range(8)]
    below, full = "BELOW_THRESHOLD", "CONSECUTIVE_LIMIT"
    assert reasons == ["WARMUP", below, below, full, below, *["COUNT_LIMIT"] * 3]
    steps = run("w???", limits=(-1, 1))
    assert [steps(*NONE)[1] for _ in range(4)] == ["WARMUP", *["ABOVE_THRESHOLD"] * 3]


def test_thresholds_of_0_and_1(run):
    steps = run("w??", threshold=1.0)
    assert [steps(*SOME)[1] for _ in range(2)] == ["WARMUP", "THRESHOLD_ALWAYS"]
    assert steps(*[(NAN, 0.0)] * 3)[1] == "NAN"
    steps = run("w?", threshold=0.0)
    assert [steps(*NONE)[1] for _ in range(2)] == ["WARMUP", "THRESHOLD_OFF"]


def test_blocks_are_stored_on_every_third_step_and_when_nothing_is(run):
    steps = run("w????????", every=3)
    assert [steps(*SOME)[2] for _ in range(5)] == [1, 0, 0, 2, 0]
    steps.state.invalidate()
    assert steps(*SOME) == ("CCC", "SHAPE_CHANGED", 1)
    assert steps.state.store[bs.STAMP].item() == 5
    assert [steps(*SOME)[2] for _ in range(3)] == [2, 0, 0]


NUMBERS = torch.tensor([0.0, 0.03, 0.1, 0.25, 7.0, math.inf, NAN])


@given(
    seed=st.integers(0, 2**16),
    plan=st.text("w?????msba", min_size=1, max_size=6),
    blocks=st.integers(1, 7),
    threshold=st.sampled_from([0.0, 0.1, 1.0]),
    limits=st.tuples(st.integers(-1, 3), st.integers(-1, 2)),
    every=st.integers(1, 3),
    reference=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_triton_decides_bit_for_bit_as_python(
    seed, plan, blocks, threshold, limits, every, reference
):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)

    def draw(values):
        return values[torch.randint(len(values), (blocks,), generator=generator)]

    prunable = draw(torch.tensor([False, True])).tolist()
    steps = []
    for _ in plan:
        pairs = torch.stack([draw(NUMBERS), draw(torch.tensor([0.0, 1.0]))], 1).to(device)
        steps.append(None if seed % 5 == 0 else pairs)
    results = []
    for impl in IMPLS:
        options = {"threshold": threshold, "limits": limits, "every": every}
        state = steps_of(plan, prunable, device, **options)
        state.counters[ls.REFERENCE] = reference
        state.flags.fill_(-7)
        state.trace.fill_(-7)
        results.append([])
        for decisions in steps:
            decide_step(state, decisions, impl=impl)
            results[-1].append(contents(state))
    for ours, theirs in zip(*results, strict=True):
        for name, x in ours.items():
            assert torch.equal(x, theirs[name]), name


def test_a_full_state_is_an_error_or_decides_without_a_trace(device):
    for impl in IMPLS:
        state = steps_of("w", [True], device)
        decide_step(state, None, impl=impl)
        trace = state.trace.clone()
        if impl == "reference":
            with pytest.raises(RuntimeError, match=r"below the capacity of the state, 1.*grow"):
                decide_step(state, None, impl=impl)
            continue
        decide_step(state, torch.tensor([[0.05, 1.0]], device=device), impl=impl)
        assert state.flags.tolist() == [1]
        assert torch.equal(state.trace, trace)
        assert state.trace_reason.tolist() == [Reason.WARMUP]


def test_a_state_that_grows_keeps_its_steps(device):
    state = steps_of("w?", [True, True], device)
    for _ in range(2):
        decide_step(state, torch.tensor([[0.05, 1.0], [0.2, 0.0]], device=device))
    before = contents(state)
    state.grow(5)
    assert state.trace.tolist() == [[0, 0], [1, 0], [0, 0], [0, 0], [0, 0]]
    state.grow(3)
    assert state.capacity == 5
    other = state.clone()
    assert not set(other.addresses()) & set(state.addresses())
    decide_step(state, None)
    assert not torch.equal(state.counters, other.counters)
    state.copy_(other)
    after = contents(state)
    for name in ("counters", "flags", "store"):
        assert torch.equal(after[name], before[name])


def test_rejects_what_does_not_fit(device):
    state = steps_of("w", [True, True], device)
    for decisions in (torch.zeros(3, 2), torch.zeros(2), torch.zeros(2, 2, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"decisions must be float32 \(2, 2\)"):
            decide_step(state, decisions.to(device))
    with pytest.raises(ValueError, match=r"decisions must be .* on"):
        decide_step(state, torch.zeros(2, 2, device="meta"))


def test_is_registered_with_a_fake(device):
    for impl in IMPLS:
        for decisions in (None, torch.ones(2, 2, device=device)):
            state = steps_of("w?", [True, True], device)
            op = torch.ops.dbcache.decide_step.default
            torch.library.opcheck(op, (*state.tensors(), decisions, impl))
