from dataclasses import dataclass, field
from math import inf, isnan, nan, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import (
    BatchReduce,
    LaneState,
    PlanCode,
    Predictor,
    Reason,
    Signal,
)
from dbcache.kernels.common.sums import MAX_PARTIALS
from dbcache.kernels.decision.decide import decide

# the interpreter divides with NumPy, which warns of what the tests do on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in divide:RuntimeWarning")

IMPLS = ["triton", "reference"]
DYNAMIC, STATIC, WARMUP, MASK = PlanCode
W, M, D, S = "wm?s"
PLAN = {W: WARMUP, M: MASK, D: DYNAMIC, S: STATIC}
PLAN |= {"b": ls.KNOWN + Reason.BELOW_THRESHOLD, "a": ls.KNOWN + Reason.ABOVE_THRESHOLD}


@dataclass
class Lane:
    """A lane under test: what is configured, and what each step measures."""

    device: torch.device
    impl: str
    plan: str
    threshold: float = 0.5
    max_cached: int = -1
    max_consecutive: int = -1
    max_accumulated: float = 0.0
    slots: int = 1
    order: int = 0
    encoder_order: int = 0
    batch_reduce: BatchReduce = BatchReduce.MEAN
    predictor: Predictor = Predictor.TAYLOR
    scale: float = 0.0
    signal: Signal = Signal.CHANGE
    polynomial: tuple = (0.0,) * 5
    state: LaneState = field(init=False)

    def __post_init__(self):
        self.state = LaneState.allocate(len(self.plan), self.device)
        orders = (self.order, self.encoder_order)
        limits = (self.max_cached, self.max_consecutive, self.slots, *orders)
        limits += (self.batch_reduce, self.predictor, self.signal)
        self.state.limits.copy_(torch.tensor(limits))
        thresholds = (self.threshold, self.max_accumulated, 0.0, self.scale)
        thresholds += self.polynomial
        self.state.thresholds.copy_(torch.tensor(thresholds))
        self.state.plan.copy_(torch.tensor([PLAN[code] for code in self.plan]))

    def step(self, num=None, den=1.0):
        """Decide one step whose change is num / den; None: not measured."""
        partials = None if num is None else torch.tensor([[[num, den]]], device=self.device)
        decide(self.state, partials, impl=self.impl)

    def run(self, *diffs):
        """Decide a step per entry and return the reasons, a blank between them."""
        for diff in diffs:
            self.step(diff)
        return " ".join(Reason(r).name for r in self.state.trace_reason.tolist() if r >= 0)

    def count(self, entry):
        return self.state.counters[entry].item()


@pytest.fixture(params=IMPLS)
def lane(request, device):
    """Return a function that makes a lane: `lane(plan, max_cached=3)`."""
    return lambda plan, **options: Lane(device, request.param, plan, **options)


# --- the rules, each alone ---


def test_warmup_and_mask_run_in_full_whatever_is_measured(lane):
    assert lane("wmwm").run(None, 0.0, 0.0, nan) == "WARMUP MASK WARMUP MASK"


def test_dynamic_steps_compare_with_the_threshold(lane):
    one = lane("w????")
    reasons = one.run(None, 0.25, 0.5, 0.75, 0.0)
    assert reasons == ("WARMUP BELOW_THRESHOLD ABOVE_THRESHOLD ABOVE_THRESHOLD BELOW_THRESHOLD")
    assert one.state.trace_diff.tolist() == [-1.0, 0.25, 0.5, 0.75, 0.0]
    assert one.count(ls.STEP) == 5
    assert one.count(ls.CACHED) == 1
    assert one.count(ls.REASON) == Reason.BELOW_THRESHOLD
    assert one.count(ls.CACHED_STEPS) == 2


def test_static_steps_cache_without_measuring(lane):
    one = lane("wss")
    assert one.run(None, 0.9, nan) == "WARMUP STATIC STATIC"
    assert one.state.trace_diff.tolist() == [-1.0, -1.0, -1.0]
    assert one.state.values[ls.ACCUMULATED] == 0


def test_a_lane_without_a_reference_runs_in_full(lane):
    assert lane("?").run(0.0) == "NO_REFERENCE"
    assert lane("s").run(None) == "NO_REFERENCE"
    assert lane("?").run(None) == "NO_REFERENCE"


def test_what_is_measured_without_a_reference_is_not_recorded(lane):
    one = lane("?")
    one.run(0.25)
    assert one.state.trace_diff.tolist() == [-1.0]
    assert one.state.values[ls.DIFF] == -1


def test_a_lane_that_lost_its_reference_says_so(lane):
    for plan in ("w?", "ws"):
        one = lane(plan)
        one.run(None)
        one.state.invalidate()
        assert one.run(0.0) == "WARMUP SHAPE_CHANGED"
        assert one.count(ls.REFERENCE) == 1
        assert one.count(ls.SNAPSHOTS) == 1


def test_a_request_caches_no_more_than_its_limit(lane):
    reasons = lane("w??w?", max_cached=2).run(None, 0.1, 0.1, None, 0.1)
    assert reasons == "WARMUP BELOW_THRESHOLD BELOW_THRESHOLD WARMUP COUNT_LIMIT"
    assert lane("w?", max_cached=0).run(None, 0.1) == "WARMUP COUNT_LIMIT"


def test_never_more_than_max_consecutive_steps_cache_in_a_row(lane):
    cached, limit = " BELOW_THRESHOLD", " CONSECUTIVE_LIMIT"
    reasons = lane("w?????", max_consecutive=2).run(None, *[0.1] * 5)
    assert reasons == "WARMUP" + cached * 2 + limit + cached * 2
    assert lane("w?", max_consecutive=0).run(None, 0.1) == "WARMUP CONSECUTIVE_LIMIT"


def test_static_steps_count_towards_the_limits_but_are_not_stopped_by_them(lane):
    one = lane("wsss?", max_consecutive=2, max_cached=9)
    assert one.run(None, None, None, None, 0.1) == "WARMUP STATIC STATIC STATIC CONSECUTIVE_LIMIT"


def test_the_accumulated_change_restarts_with_each_full_step(lane):
    one = lane("w????????", max_accumulated=0.5)
    cached, limit = " BELOW_THRESHOLD", " ACCUMULATED_LIMIT"
    assert one.run(None, *[0.25] * 8) == "WARMUP" + (cached * 2 + limit) * 2 + cached * 2
    assert one.state.values[ls.ACCUMULATED] == 0.5


def test_a_threshold_of_0_or_less_never_caches_and_of_1_or_more_always(lane):
    for threshold in (0.0, -1.0):
        assert lane("w?", threshold=threshold).run(None, 0.0) == "WARMUP THRESHOLD_OFF"
    for threshold in (1.0, 2.0):
        one = lane("w??", threshold=threshold)
        assert one.run(None, 5.0, 0.1) == "WARMUP THRESHOLD_ALWAYS THRESHOLD_ALWAYS"


def test_nan_runs_in_full_even_if_the_threshold_is_always(lane):
    for threshold in (0.5, 1.0):
        one = lane("w?", threshold=threshold)
        assert one.run(None, nan) == "WARMUP NAN"
        assert isnan(one.state.trace_diff[1])
    assert lane("w?").run(None, inf) == "WARMUP ABOVE_THRESHOLD"
    assert lane("w?", threshold=0.0).run(None, nan) == "WARMUP THRESHOLD_OFF"


def test_dynamic_steps_that_were_not_measured_run_in_full(lane):
    one = lane("w?", threshold=1.0)
    assert one.run(None, None) == "WARMUP NAN"
    assert one.state.trace_diff.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("num", "den", "reason"),
    [(0.0, 0.0, "NAN"), (1.0, 0.0, "ABOVE_THRESHOLD"), (inf, inf, "NAN"), (0.0, inf, "BELOW")],
)
def test_a_reference_of_zeros_or_infinities_is_defined(lane, num, den, reason):
    one = lane("w?")
    one.step()
    one.step(num, den)
    assert Reason(one.count(ls.REASON)).name.startswith(reason)


def test_the_first_rule_that_applies_decides_and_the_change_is_recorded_all_the_same(lane):
    everything = {"max_cached": 1, "max_consecutive": 1, "max_accumulated": 0.1, "threshold": 0.9}
    rules = ["COUNT_LIMIT", "CONSECUTIVE_LIMIT", "ACCUMULATED_LIMIT", "BELOW_THRESHOLD"]
    off = {"max_cached": -1, "max_consecutive": -1, "max_accumulated": 0.0}
    for rule, switched_off in zip(rules, [None, *off], strict=True):
        if switched_off:
            everything[switched_off] = off[switched_off]
        one = lane("w??", **everything)
        assert one.run(None, 0.25, 0.125) == f"WARMUP BELOW_THRESHOLD {rule}"
        assert one.state.trace_diff.tolist() == [-1.0, 0.25, 0.125]


def test_limits_come_before_a_lost_reference(lane):
    one = lane("w??", max_consecutive=1)
    one.run(None, 0.1)
    one.state.invalidate()
    assert one.run(0.1) == "WARMUP BELOW_THRESHOLD CONSECUTIVE_LIMIT"
    assert one.state.trace_diff[2] == -1


def test_steps_decided_ahead_follow_their_reason_but_not_without_a_reference(lane):
    one = lane("bbab")
    reasons = one.run(None, 0.9, 0.9)
    assert reasons == "NO_REFERENCE BELOW_THRESHOLD ABOVE_THRESHOLD"
    assert one.state.trace_diff.tolist() == [-1.0] * 4
    one.state.invalidate()
    assert one.run(None) == reasons + " SHAPE_CHANGED"


def test_a_sum_is_compared_with_the_threshold_and_starts_again_after_a_full_step(lane):
    plain = (0.0, 0.0, 0.0, 1.0, 0.0)
    one = lane("w????????", signal=Signal.SUM, polynomial=plain, threshold=0.5)
    cached, full = " BELOW_THRESHOLD", " ABOVE_THRESHOLD"
    # 0.25, then 0.5 is no longer below; 0.125, 0.375, 0.5; a change of 2 is full by itself
    diffs = (0.25, 0.25, 0.125, 0.25, 0.125, 2.0, 0.25, 0.125)
    assert one.run(None, *diffs) == "WARMUP" + cached + full + cached * 2 + full * 2 + cached * 2
    assert one.state.trace_diff.tolist() == [-1.0, *diffs]
    assert one.state.values[ls.ACCUMULATED] == 0.375


def test_a_sum_is_that_of_the_polynomial(lane):
    one = lane("w??", signal=Signal.SUM, polynomial=(16.0, -8.0, 4.0, 2.0, 0.5), threshold=9.0)
    one.run(None, 0.5, 1.0)
    assert one.state.trace_diff.tolist() == [-1.0, 2.5, 14.5]
    assert one.run() == "WARMUP BELOW_THRESHOLD ABOVE_THRESHOLD"


def test_a_summed_threshold_of_1_or_more_is_no_special_case(lane):
    plain = (0.0, 0.0, 0.0, 1.0, 0.0)
    one = lane("w???", signal=Signal.SUM, polynomial=plain, threshold=1.5)
    assert one.run(None, 0.75, 0.5, 0.5) == "WARMUP" + " BELOW_THRESHOLD" * 2 + " ABOVE_THRESHOLD"
    off = lane("w?", signal=Signal.SUM, polynomial=plain, threshold=0.0)
    assert off.run(None, 0.0) == "WARMUP THRESHOLD_OFF"


def test_a_rate_multiplies_what_moved_and_is_needed(lane):
    one = lane("w????s", signal=Signal.RATE, threshold=0.5)
    assert one.run(None, 0.1) == "WARMUP NO_REFERENCE"
    one.state.values[ls.RATE] = 0.25
    for num in (1.0, 1.0):
        one.step(num, 7.0)  # the size of what moved plays no part
    assert one.state.trace_diff.tolist()[:4] == [-1.0, -1.0, 0.25, 0.25]
    one.state.invalidate()
    assert one.run(0.1, None) == (
        "WARMUP NO_REFERENCE BELOW_THRESHOLD ABOVE_THRESHOLD SHAPE_CHANGED STATIC"
    )
    one.state.reset()
    assert one.state.values[ls.RATE] == ls.NO_OUTPUT


@pytest.mark.parametrize("rate", [ls.NO_OUTPUT, ls.ONE_OUTPUT])
def test_without_a_rate_nothing_is_measured(lane, rate):
    one = lane("w?s", signal=Signal.RATE, threshold=0.5)
    one.step()
    one.state.values[ls.RATE] = rate
    assert one.run(0.1, None) == "WARMUP NO_REFERENCE STATIC"
    assert one.state.trace_diff.tolist()[:3] == [-1.0] * 3


def test_a_rate_that_is_not_finite_runs_in_full(lane):
    for rate, num, reason in ((nan, 1.0, "NAN"), (inf, 1.0, "ABOVE_THRESHOLD"), (inf, 0.0, "NAN")):
        one = lane("w?", signal=Signal.RATE)
        one.step()
        one.state.values[ls.RATE] = rate
        assert one.run(num) == f"WARMUP {reason}"


# --- the ring ---


def test_full_steps_fill_the_ring_in_turn(lane):
    one = lane("wwwsww", slots=3)
    seen = []
    for _ in one.plan:
        one.step()
        seen.append([one.count(entry) for entry in (ls.SLOT, ls.HEAD, ls.SNAPSHOTS, ls.CACHED)])
    assert seen == [
        [0, 1, 1, 0],
        [1, 2, 2, 0],
        [2, 0, 3, 0],
        [2, 0, 3, 1],
        [0, 1, 3, 0],
        [1, 2, 3, 0],
    ]
    steps = one.state.counters[ls.RING_STEPS : ls.RING_STEPS + 8].tolist()
    assert steps == [4, 5, 2, 0, 0, 0, 0, 0]


def test_weights_are_those_of_the_steps_in_the_ring(lane):
    one = lane("wwwwsws", slots=2, order=1, encoder_order=0)
    weights = []
    for _ in one.plan:
        one.step()
        weights.append((one.state.weights.tolist()[:2], one.state.encoder_weights.tolist()[:2]))
    assert weights[4] == ([-1.0, 2.0], [0.0, 1.0])  # steps 2 and 3 predict step 4
    assert weights[6] == ([1.5, -0.5], [1.0, 0.0])  # steps 5 (in slot 0) and 3 predict step 6


@pytest.mark.parametrize("predictor", Predictor)
def test_taylorseer_takes_differences_from_the_fourth_step_on_and_the_others_at_once(
    lane, predictor
):
    one = lane("wwswswswsws", slots=4, order=3, predictor=predictor, scale=0.5)
    used = []
    for code in one.plan:
        one.step()
        if code == "s":
            used.append(sum(w != 0 for w in one.state.weights.tolist()))
    others = [2, 3, 3, 3, 3] if predictor is Predictor.FOCA else [2, 3, 4, 4, 4]
    assert used == ([1, 2, 3, 4, 4] if predictor is Predictor.TAYLOR else others)


def test_the_order_is_bounded_by_the_snapshots_there_are(lane):
    one = lane("wss", slots=4, order=3, encoder_order=2)
    for _ in one.plan:
        one.step()
        if one.count(ls.CACHED):
            assert one.state.weights.tolist() == [1.0] + [0.0] * 7
            assert one.state.encoder_weights.tolist() == [1.0] + [0.0] * 7


def test_unused_slots_get_weight_0(lane):
    one = lane("wwwws", slots=4, order=1)
    for _ in one.plan:
        one.state.values[ls.WEIGHTS :] = nan
        one.step()
    assert one.state.weights.tolist() == [0.0, 0.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert one.state.encoder_weights.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_reset_starts_over(lane):
    one = lane("w?", max_cached=1)
    assert one.run(None, 0.1) == "WARMUP BELOW_THRESHOLD"
    one.state.reset()
    assert one.run(None, 0.1) == "WARMUP BELOW_THRESHOLD"


def test_newton_weights_follow_the_ring_around(lane):
    one = lane("wwswmsws", slots=3, order=2, predictor=Predictor.NEWTON)
    full = []
    for step, code in enumerate(one.plan):
        one.step()
        if code != "s":
            full.append(step)
            continue
        expected = [0.0] * 8
        newest_first = full[::-1][:3]
        ages = [step - s for s in newest_first]
        for j, age in enumerate(ages):  # Lagrange's weights, where they belong in the ring
            weight = prod(other / (other - age) for other in ages if other != age)
            expected[(len(full) - 1 - j) % 3] = weight
        assert one.state.weights.tolist() == pytest.approx(expected, abs=1e-5)


# --- both implementations ---

SPECIAL = {1: (nan, 1.0), 2: (inf, 1.0), 3: (0.0, 0.0), 4: (1.0, 0.0), 5: (inf, inf), 6: ()}
INVALIDATE = 7
STEPS = st.tuples(
    st.sampled_from("??????????sswmba"),
    st.tuples(st.floats(0, 1, width=32), st.sampled_from([1.0, 3.0, 0.7, 11.0])),
    st.integers(0, 60),  # picks a special case now and then
    st.sampled_from([None, None, None, 0.01, 0.3, 1.7, nan, inf]),  # a new rate
)
OPTIONS = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from([0.12, 0.3, 0.6, 0.6, 0.99, 0.99, 0.0, -1.0, 1.0, 2.0]),
        "max_cached": st.sampled_from([-1, -1, -1, 0, 5, 50]),
        "max_consecutive": st.sampled_from([-1, -1, 0, 1, 2, 5]),
        "max_accumulated": st.sampled_from([0.0, -1.0, 0.05, 0.3, 0.7]),
        "slots": st.integers(1, 8),
        "order": st.integers(0, 4),
        "encoder_order": st.integers(0, 4),
        "batch_reduce": st.sampled_from(BatchReduce),
        "predictor": st.sampled_from(Predictor),
        "scale": st.sampled_from([0.5, 0.18, 2.0]),
        "signal": st.sampled_from([*Signal, Signal.CHANGE]),
        "polynomial": st.sampled_from(
            [(0.0, 0.0, 0.0, 1.0, 0.0), (4.99e02, -2.84e02, 55.8, -3.82, 0.264)]
        ),
    }
)


@given(steps=st.lists(STEPS, min_size=60, max_size=60), options=OPTIONS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_both_implementations_agree_bit_for_bit(steps, options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = "".join(code for code, *_ in steps)
    lanes = [Lane(device, impl, plan, **options) for impl in IMPLS]
    for i, (_, change, case, rate) in enumerate(steps):
        for one in lanes:
            if case == INVALIDATE:
                one.state.invalidate()
            if rate is not None:
                one.state.values[ls.RATE] = rate
            one.step(*SPECIAL.get(case, change))
        assert_same_bits(lanes[0].state, lanes[1].state, i)


@pytest.mark.covering
@pytest.mark.parametrize("programs", [1, 2, 3, 7, 100, MAX_PARTIALS])
@pytest.mark.parametrize(("samples", "width"), [(1, 2), (3, 2), (3, 4)])
@pytest.mark.parametrize("batch_reduce", BatchReduce)
def test_both_implementations_add_partial_sums_in_the_same_order(
    device, samples, width, programs, batch_reduce
):
    generator = torch.Generator().manual_seed(samples * programs)
    partials = torch.rand(samples, programs, width, generator=generator).to(device)
    if width == 4:
        partials[0, :, 2:] = 0  # no important token in this sample
    states = []
    for impl in IMPLS:
        one = Lane(device, impl, "w?", batch_reduce=batch_reduce)
        one.step()
        decide(one.state, partials, impl=impl)
        states.append(one.state)
    assert_same_bits(*states, programs)
    sums = partials.double().sum(1)
    if batch_reduce == BatchReduce.MEAN:
        sums = sums.sum(0, keepdim=True)
    change = max((x[-2] / x[-1] if x[-2] else x[0] / x[1]).item() for x in sums)
    assert states[0].values[ls.DIFF].item() == pytest.approx(change, rel=1e-6)


def assert_same_bits(a, b, where):
    for name in ls.TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        if x.is_floating_point():  # all NaN are one
            x, y = (torch.where(t.isnan(), nan, t).view(torch.int32) for t in (x, y))
        assert torch.equal(x, y), f"{name} differs at {where}: {x.tolist()} and {y.tolist()}"


# --- interface ---


def test_a_step_past_the_capacity_is_an_error_and_writes_nothing_outside(device):
    one = Lane(device, "reference", "w")
    one.step()
    with pytest.raises(RuntimeError, match=r"capacity of the state, 1, got 1; .*grow"):
        one.step()
    wide = Lane(device, "triton", "www")
    state = wide.state
    inner = LaneState(
        state.counters, state.values, state.limits, state.thresholds,
        state.plan[:1], state.trace_reason[:1], state.trace_diff[:1],
    )  # fmt: skip
    state.trace_reason.fill_(7)
    state.trace_diff.fill_(7)
    decide(inner, None, impl="triton")
    decide(inner, None, impl="triton")
    assert state.trace_reason.tolist() == [Reason.WARMUP, 7, 7]
    assert state.trace_diff.tolist() == [-1, 7, 7]


def test_partials_may_have_any_strides(device):
    partials = torch.tensor([[[0.25, 9.0, 1.0, 9.0]]], device=device)[..., ::2]
    for impl in IMPLS:
        one = Lane(device, impl, "w?")
        one.step()
        decide(one.state, partials, impl=impl)
        assert one.state.values[ls.DIFF] == 0.25


def test_rejects_partials_that_do_not_fit():
    state = LaneState.allocate(1, "cpu")
    with pytest.raises(ValueError, match=r"must be \(B, T, 2 or 4\) with T <= 896, got \(1, 2\)"):
        decide(state, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"got \(1, 897, 2\)"):
        decide(state, torch.zeros(1, MAX_PARTIALS + 1, 2))
    with pytest.raises(ValueError, match=r"must be float32 on cpu, got torch.float64"):
        decide(state, torch.zeros(1, 1, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"must be float32 on cpu, got torch.float32 and meta"):
        decide(state, torch.zeros(1, 1, 2, device="meta"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("measured", [False, True])
def test_the_op_is_registered_as_it_behaves(device, measured, impl):
    one = Lane(device, impl, "w??")
    one.step()
    partials = torch.rand(1, 1, 2, device=device) if measured else None
    op = torch.ops.dbcache.decide.default
    torch.library.opcheck(op, (*one.state.tensors(), partials, impl))


def test_the_names_in_the_kernel_are_those_of_the_state():
    for name in ("STEP", "HEAD", "SLOT", "RING_STEPS", "WEIGHTS", "ENCODER_WEIGHTS", "THRESHOLD"):
        assert getattr(ls.LANE, name).value == getattr(ls, name)
    assert ls.REASONS.NAN.value == Reason.NAN
