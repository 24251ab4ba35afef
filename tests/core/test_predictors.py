"""Predictors in the whole machine, against forecasts made with NumPy in float64."""

from dataclasses import dataclass
from math import factorial

import inside
import numpy as np
import pytest
import torch
from tiny import generate, pipeline

import dbcache
from dbcache import (
    BlockAdapter,
    CalibratorConfig,
    CustomCalibratorConfig,
    DBCacheConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    ForwardPattern,
    HermiteCalibratorConfig,
    SpectrumCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from dbcache.config.predictor_registry import registered
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState, PlanCode
from dbcache.kernels.decision.decide import decide

pytestmark = pytest.mark.usefixtures("one_thread")

# uneven at first, then even, and more full steps than any ring has slots
MASK = [int(c) for c in "1110110101001000100010001010101010100"]
STEPS = len(MASK)
FULL = [step for step, is_full in enumerate(MASK) if is_full]
TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Relative to the largest element. What is stored is rounded, and the weights multiply that."""
DTYPES = list(TOLERANCES)


class Residuals:
    """What the middle blocks of `Model` add at each step: smooth, and random in the elements."""

    def __init__(self, tokens: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        parts = random.normal(size=(4, 2, tokens, 8))
        self.at = lambda t: (
            parts[0] * 0.97**t + parts[1] * 0.85**t + 0.02 * t * parts[2] + parts[3] * np.sin(t / 9)
        )


class First(torch.nn.Module):
    def forward(self, hidden_states, encoder_hidden_states):
        return hidden_states + 0.25, encoder_hidden_states * 0.5


class Middle(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.__dict__["model"] = model

    def forward(self, hidden_states, encoder_hidden_states):
        hidden, encoder = (
            torch.tensor(each.at(self.model.step)).to(hidden_states.dtype)
            for each in (self.model.hidden, self.model.encoder)
        )
        return hidden_states + hidden, encoder_hidden_states + encoder


class Model(torch.nn.Module):
    """Two blocks whose residuals are given; runs one step per call."""

    def __init__(self):
        super().__init__()
        self.step = 0
        self.hidden, self.encoder = Residuals(5, 0), Residuals(3, 1)
        self.blocks = torch.nn.ModuleList([First(), Middle(self)])

    def forward(self, x, encoder):
        for block in self.blocks:
            x, encoder = block(x, encoder)
        self.step += 1
        return x, encoder


def enable(model, calibrator, **options):
    adapter = BlockAdapter(
        transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_0
    )
    options = {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 0,
        "steps_computation_mask": MASK,
        "steps_computation_policy": "static",
        "num_inference_steps": STEPS,
    } | options
    dbcache.enable(adapter, DBCacheConfig(**options), calibrator)
    return model


def run(model, steps):
    """Run so many steps."""
    for step in range(steps):
        model(*inputs(step, torch.float32))


def inputs(step, dtype):
    """Return what goes in at `step`: it changes, so that residuals and outputs differ."""
    return (
        torch.full((2, 5, 8), 0.1 * step, dtype=dtype),
        torch.full((2, 3, 8), 1 - 0.05 * step, dtype=dtype),
    )


# --- forecasts as they are told; `steps` oldest first, a row of `y` per step ---


def polynomial(steps, y, step, degree):
    return np.polyval(np.polyfit(np.array(steps) - step, y, degree), 0.0)


def line(steps, y, step):
    return polynomial(steps[-2:], y[-2:], step, 1) if len(steps) > 1 else y[-1]


def foca(steps, y, step, horizon=0.5):
    if len(steps) < 3:
        return line(steps, y, step)
    parabola = np.polyfit(np.array(steps[-3:]) - steps[-1], y[-3:], 2)
    gap = steps[-1] - steps[-2]
    last_slope = (y[-1] - y[-2]) / gap
    ahead = step - steps[-1]
    return y[-1] + ahead * last_slope + min(ahead, horizon * gap) * (parabola[1] - last_slope)


def dmd(steps, y, step, history=4, ridge=1.0):
    steps, y = steps[-history:], y[-history:]
    gaps = np.diff(steps)[::-1]
    even = 1 + (len(gaps) if (gaps == gaps[:1]).all() else int(np.argmax(gaps != gaps[0])))
    if even < 3:
        return line(steps, y, step)
    y = y[-even:]
    older, level, newer = np.diff(y, axis=0)[:-1], y[1:-1], np.diff(y, axis=0)[1:]
    matrix = np.stack([older.ravel(), level.ravel()], axis=1)
    pull = np.sqrt(ridge) * np.linalg.norm(matrix, axis=0)
    matrix = np.concatenate([matrix, np.diag(pull)])
    target = np.append(newer.ravel(), [pull[0], 0.0])
    alpha, gamma = np.linalg.lstsq(matrix, target, rcond=None)[0]
    companion = np.array([[1 + alpha + gamma, -alpha], [1, 0]], dtype=complex)
    values, vectors = np.linalg.eig(companion)
    power = np.diag(values ** ((step - steps[-1]) / gaps[0]))
    weights = (vectors @ power @ np.linalg.inv(vectors))[0].real
    return weights[0] * y[-1] + weights[1] * y[-2]


def spectrum(steps, y, step, order=4, window=8, ridge=1e-4, blend=0.5):
    steps, y = steps[-window:], y[-window:]
    if len(steps) == 1:
        return y[-1]
    order = min(order, len(steps) // 2)
    x = 2 * np.array([*steps, step]) / (STEPS - 1) - 1
    basis = np.polynomial.chebyshev.chebvander(x, order)
    matrix = np.concatenate([basis[:-1], np.sqrt(ridge) * np.eye(order + 1)])
    target = np.concatenate([y, np.zeros((order + 1, y.shape[1]))])
    coefficients = np.linalg.lstsq(matrix, target, rcond=None)[0]
    return blend * basis[-1] @ coefficients + (1 - blend) * line(steps, y, step)


def taylor(steps, y, step, order=2):
    settled = [s >= 3 for s in steps]
    ladder, total = [list(y)], y[-1]
    for i in range(1, order + 1):
        if len(steps) <= i or not all(settled[-i:]):
            break
        below = ladder[-1]
        gaps = steps[1:] if i == 1 else steps[i:]
        before = steps[i - 1 : -1]
        pairs = zip(below[1:], below[:-1], gaps, before, strict=True)
        ladder.append([(a - b) / (s - r) for a, b, s, r in pairs])
        total = total + ladder[-1][-1] * (step - steps[-1]) ** i / factorial(i)
    return total


@dbcache.register_predictor("lagging line", snapshots=3)
def lagging(steps, step):
    """The line through the newest and the third newest snapshot."""
    if len(steps) < 3:
        return [1.0]
    ahead = (step - steps[0]) / (steps[0] - steps[2])
    return [1 + ahead, 0.0, -ahead]


def lagging_line(steps, y, step):
    if len(steps) < 3:
        return y[-1]
    return line([steps[-3], steps[-1]], np.stack([y[-3], y[-1]]), step)


@dataclass(frozen=True)
class Case:
    make: type
    fields: dict
    slots: int
    forecast: object


CASES = {
    "reuse": Case(CalibratorConfig, {}, 1, lambda steps, y, step: y[-1]),
    "taylorseer": Case(TaylorSeerCalibratorConfig, {"taylorseer_order": 2}, 3, taylor),
    "hermite": Case(
        HermiteCalibratorConfig, {}, 2,
        lambda steps, y, step: y[-1] / 2 + line(steps, y, step) / 2,
    ),
    "foca": Case(FoCaCalibratorConfig, {}, 3, foca),
    "dmd": Case(DMDCalibratorConfig, {}, 4, dmd),
    "spectrum": Case(SpectrumCalibratorConfig, {}, 8, spectrum),
    "custom": Case(CustomCalibratorConfig, {"predictor_name": "lagging line"}, 3, lagging_line),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.covering
@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_type", ["residual", "hidden_states"])
def test_cached_steps_are_the_forecast_in_both_streams(case, dtype, cache_type):
    calibrator = case.make(**case.fields, calibrator_cache_type=cache_type)
    model = enable(Model(), calibrator)
    stored = [[], []]
    is_whole = cache_type == "hidden_states" and case.slots > 1
    for step in range(STEPS):
        given = inputs(step, dtype)
        passed = [x.double().numpy() for x in First()(*given)]
        outputs = [x.double().numpy() for x in model(*given)]
        if MASK[step]:
            for kept, before, after in zip(stored, passed, outputs, strict=True):
                kept.append((after if is_whole else after - before).ravel())
            continue
        model.step = step + 1
        steps = [s for s in FULL if s < step]
        for kept, before, after in zip(stored, passed, outputs, strict=True):
            forecast = case.forecast(steps, np.stack(kept), step)
            expected = forecast.reshape(after.shape) + (0 if is_whole else before)
            error = np.abs(after - expected).max() / np.abs(expected).max()
            assert error <= TOLERANCES[dtype], (step, error)


@pytest.mark.covering
@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", ["model", "float32"])
def test_a_lane_keeps_p_ref_and_the_slots_of_its_predictor(case, dtype, cache_dtype):
    model = enable(Model(), case.make(**case.fields), cache_dtype=cache_dtype)
    model(*inputs(0, dtype))
    lane = inside.stacks(model)[0].lanes[None]
    itemsize = 4 if cache_dtype == "float32" else dtype.itemsize
    expected = 80 * dtype.itemsize + case.slots * (80 + 48) * itemsize
    assert lane.nbytes() == expected
    assert case.make(**case.fields).slots == case.slots


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.slots > 1])
def test_one_stream_alone_is_predicted_and_the_other_reused(name):
    case = CASES[name]
    calibrator = case.make(**case.fields, enable_encoder_calibrator=False)
    model = enable(Model(), calibrator)
    for step in range(STEPS):
        hidden, encoder = inputs(step, torch.float32)
        _, out = model(hidden, encoder)
        if MASK[step]:
            kept = out - encoder * 0.5
        else:
            model.step = step + 1
            torch.testing.assert_close(out, encoder * 0.5 + kept)


@pytest.mark.parametrize("order", range(5))
def test_taylorseer_equals_cache_dit_on_random_sequences(order):
    pytest.importorskip("cache_dit", minversion="1.5.3")
    from cache_dit.caching.cache_contexts.calibrators import TaylorSeerCalibrator

    for seed in range(12):
        random = np.random.default_rng(seed)
        plan = [True, *(random.random(29) < 0.5)]
        values = torch.tensor(random.normal(size=(30, 7)))
        theirs = TaylorSeerCalibrator(n_derivatives=order)
        state = LaneState.allocate(30, "cpu")
        state.limits[ls.SLOTS], state.limits[ls.ORDER] = order + 1, order
        state.plan.copy_(
            torch.tensor([PlanCode.MASK if full else PlanCode.STATIC for full in plan])
        )
        ring = torch.zeros(order + 1, 7, dtype=torch.float64)
        for step, is_full in enumerate(plan):
            theirs.mark_step_begin()
            decide(state, None)
            if is_full:
                theirs.update(values[step])
                ring[state.counters[ls.SLOT]] = values[step]
                continue
            expected = theirs.approximate()
            scale = (state.weights[: order + 1].abs().double() @ ring.abs()).max()
            got = state.weights[: order + 1].double() @ ring
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * scale.item() + 1e-9)


# --- on real models ---


@dbcache.register_predictor("foca by polyfit", snapshots=3)
def foca_by_polyfit(steps, step):
    return foca(steps[::-1], np.eye(len(steps)), step)[::-1]


@dbcache.register_predictor("spectrum by lstsq", snapshots=8)
def spectrum_by_lstsq(steps, step):
    return spectrum(steps[::-1], np.eye(len(steps)), step)[::-1]


@dbcache.register_predictor("line", snapshots=2)
def line_of_two(steps, step):
    return line(steps[::-1], np.eye(len(steps)), step)[::-1]


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize(
    ("calibrator", "same"),
    [
        (FoCaCalibratorConfig(), "foca by polyfit"),
        (SpectrumCalibratorConfig(), "spectrum by lstsq"),
        (DMDCalibratorConfig(dmd_ridge=1e12), "line"),
    ],
    ids=["foca", "spectrum", "dmd with nothing but the pull"],
)
def test_real_pipelines_are_predicted_alike_by_functions_of_the_user(name, calibrator, same):
    outputs, cached = [], []
    for each in (calibrator, CustomCalibratorConfig(predictor_name=same)):
        pipe = pipeline(name)
        options = {"Fn_compute_blocks": 1, "max_warmup_steps": 3, "residual_diff_threshold": 0.3}
        dbcache.enable(pipe, DBCacheConfig(max_continuous_cached_steps=2, **options), each)
        outputs.append(torch.stack(generate(pipe, STEPS)))
        cached.append([lane.cached_steps for lane in dbcache.summary(pipe).lanes])
    assert cached[0] == cached[1]
    assert len(cached[0][0]) > 8
    scale = outputs[0].abs().max().item()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=2e-5 * scale)
    assert outputs[0].isfinite().all()


# --- what a user may do wrong ---


def test_spectrum_must_know_the_number_of_steps():
    model = enable(
        Model(), SpectrumCalibratorConfig(), num_inference_steps=None, steps_computation_mask=None,
        steps_computation_policy="dynamic",
    )  # fmt: skip
    with pytest.raises(ValueError, match="blocks: SpectrumCalibratorConfig must know the number"):
        model(*inputs(0, torch.float32))


def test_predictors_are_registered_by_name_and_replaced():
    dbcache.register_predictor("mine", snapshots=1)(lambda steps, step: [1.0])
    first = registered("mine")
    function = dbcache.register_predictor("mine", snapshots=2)(lambda steps, step: [2.0])
    assert registered("mine").weigh is function
    assert (first.snapshots, registered("mine").snapshots) == (1, 2)
    with pytest.raises(ValueError, match=r"must be registered, got 'yours'; known: .*mine"):
        CustomCalibratorConfig(predictor_name="yours")
    with pytest.raises(ValueError, match="snapshots must be an integer from 1 to 8, got 9"):
        dbcache.register_predictor("mine", snapshots=9)
    with pytest.raises(TypeError, match="name must be a string, got 3"):
        dbcache.register_predictor(3)
    with pytest.raises(TypeError, match="'mine' must be a function, got 1"):
        dbcache.register_predictor("mine")(1)


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0, 0.0], [float("nan")]], ids=str)
def test_weights_that_cannot_be_used_are_an_error_that_shows_them(weights):
    dbcache.register_predictor("wrong", snapshots=3)(lambda steps, step: weights)
    model = enable(Model(), CustomCalibratorConfig(predictor_name="wrong"))
    with pytest.raises(ValueError, match=r"predictor 'wrong': at most 3 finite weights .* got \["):
        run(model, 4)


def test_a_predictor_of_the_user_sees_the_steps_of_its_request_alone():
    seen = []

    @dbcache.register_predictor("curious", snapshots=2)
    def curious(steps, step):
        seen.append((tuple(steps), step))
        return [1.0]

    model = enable(Model(), CustomCalibratorConfig(predictor_name="curious"))
    for step in range(5):
        model(*inputs(step, torch.float32))
    dbcache.refresh_context(model, num_inference_steps=STEPS)
    for step in range(4):
        model(*inputs(step, torch.float32))
    assert seen == [((2, 1), 3), ((2, 1), 3)]


def test_linear_prediction_refuses_a_ring_in_fp8():
    with pytest.raises(
        ValueError, match=r"DMDCalibratorConfig: the ring must be .* got cache_dtype"
    ):
        enable(Model(), DMDCalibratorConfig(), cache_dtype="fp8")


def test_only_predictors_that_need_it_are_asked_at_each_step():
    for case in CASES.values():
        model = enable(Model(), case.make(**case.fields))
        model(*inputs(0, torch.float32))
        lane = inside.stacks(model)[0].lanes[None]
        needs = case.make in (CustomCalibratorConfig, DMDCalibratorConfig, SpectrumCalibratorConfig)
        assert (lane.forecaster is not None) == needs


def test_graphs_refuse_a_predictor_that_runs_on_the_host():
    adapter = BlockAdapter(
        transformer=(model := Model()),
        blocks=model.blocks,
        forward_pattern=ForwardPattern.Pattern_0,
    )
    calibrator = CustomCalibratorConfig(predictor_name="lagging line")
    with pytest.raises(ValueError, match=r"blocks: steps recorded .* Custom_lagging line, a func"):
        dbcache.enable(adapter, DBCacheConfig(Fn_compute_blocks=1), calibrator, cuda_graph=True)
    assert "_dbcache" not in model.__dict__
