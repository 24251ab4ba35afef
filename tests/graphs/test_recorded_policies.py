"""Policies that follow what a call is given, recorded: every decision is that of eager steps."""

import inside
import pytest
import torch
from fake_driver import FakeDriver, Result
from graph_runs import (
    FLUX,
    MODES,
    Loop,
    agree,
    both,
    conditional_nodes,
    graphs,
    recordings,
    same,
    start,
    traces,
    two_stacks,
)
from policy_engines import calibration
from tape import Tape
from tiny import BRANCHES, FAMILIES, generate, noise, pipeline

import dbcache
from dbcache.adapters.blocks.signature import Call

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 30
THRESHOLDS = {"easycache": 0.1, "teacache": 0.1, "seacache": 0.4}


def options(policy, family="flux", branches=BRANCHES[:1]):
    known = {"calibration": calibration(family, policy, branches)} if policy == "teacache" else {}
    return known | {
        "policy": policy,
        "residual_diff_threshold": THRESHOLDS[policy],
        "max_warmup_steps": 1,
        "enable_separate_cfg": len(branches) > 1,
    }


def ids_of(rows, columns):
    ids = torch.zeros(rows * columns, 3)
    ids[:, 1] = torch.arange(rows * columns) // columns
    ids[:, 2] = torch.arange(rows * columns) % columns
    return ids


IDS = ids_of(4, 4)


@torch.no_grad()
def denoise(model, family=FLUX, steps=range(STEPS), seed=5, ids=IDS, how=lambda step: {}):
    """Denoise; return the outputs. `how` changes arguments from step to step."""
    x, outputs = noise(*family.latent_shape, seed=seed), []
    if family is FLUX:
        x = x[:, : len(ids)]
    for step in steps:
        given = family.arguments(x, 1.0 - step / STEPS, "cond")
        if family is FLUX:
            given["img_ids"] = ids
        outputs.append(model(**given | how(step))[0])
        x = x - outputs[-1] / STEPS
    return outputs


def cached_steps(target):
    (lane,) = dbcache.summary(target).lanes
    return set(lane.cached_steps)


@pytest.mark.parametrize(
    ("name", "mode"), [("flux", "host"), ("flux", "device"), ("wan", "device")]
)
@pytest.mark.parametrize("policy", THRESHOLDS)
def test_decisions_are_those_of_eager_steps_bit_for_bit(driver, name, policy, mode):
    """Also in the second request, and where a call of another kind comes eagerly in between."""
    family, predictor = FAMILIES[name], dbcache.TaylorSeerCalibratorConfig(taylorseer_order=1)

    def run(model):
        outputs = denoise(model, family)
        first.append(traces(model))
        dbcache.refresh_context(model)
        other = {13: {"return_dict": True}}
        return outputs + denoise(model, family, seed=6, how=lambda step: other.get(step, {}))

    first = []
    settings = options(policy, name) | {"calibrator_config": predictor}
    model, _ = both(run, family.build, **settings, mode=mode)
    assert first[0] == first[1]
    assert 8 <= len(cached_steps(model)) <= STEPS - 5
    assert graphs(model).replays == 2 * STEPS - 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", THRESHOLDS)
def test_the_guidance_branches_of_a_pipeline_decide_apart(driver, known, policy, mode):
    settings = options(policy, branches=BRANCHES) | {"max_warmup_steps": 3}
    pipe, decided = both(
        lambda p: generate(p, 20),
        lambda: pipeline("flux"),
        **settings,
        mode=mode,
        known=known["guidance", policy],
    )
    assert len(decided) == 2
    assert all("below threshold" in reasons for _, _, reasons, *_ in decided)
    assert len(recordings(pipe)) == 2
    assert graphs(pipe).replays == 38


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", THRESHOLDS)
def test_later_stacks_follow_the_first_ones_decision(driver, known, policy, mode):
    settings = options(policy)
    if policy == "teacache":
        (content,) = settings["calibration"]["stacks"].values()
        stacks = {"transformer_blocks": content, "single_transformer_blocks": content}
        settings["calibration"] = settings["calibration"] | {"stacks": stacks}
    adapter, _ = both(
        lambda a: denoise(a.transformer),
        lambda: two_stacks(FLUX.build()),
        **settings,
        decision_scope="model",
        mode=mode,
        known=known["stacks", policy],
    )
    first, second = dbcache.summary(adapter).lanes
    assert len(first.cached_steps) >= 8
    assert second.reasons == first.reasons
    assert graphs(adapter).replays == STEPS - 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", THRESHOLDS)
def test_other_shapes_in_between_start_the_lane_anew(driver, known, policy, mode):
    def run(model):
        few = ids_of(3, 4)
        outputs = denoise(model, steps=range(10))
        outputs += denoise(model, steps=range(10, 20), ids=few)
        outputs += denoise(model, steps=range(20, 26))
        return outputs + denoise(model, steps=range(26, 30), ids=few)

    model, ((_, _, reasons, *_),) = both(
        run, FLUX.build, **options(policy), mode=mode, known=known["shapes", policy]
    )
    # the recordings of both shapes are there when the last two changes come
    assert reasons[10] == reasons[20] == reasons[26] == "shape changed"
    assert graphs(model).replays == STEPS - 2
    assert all(cached_steps(model) & set(part) for part in (range(10), range(11, 20)))


@pytest.mark.parametrize("mode", MODES)
def test_the_size_of_the_latents_is_part_of_the_kind_of_a_call(driver, mode):
    """Of the same number of tokens, another grid has other frequencies."""
    decided = []

    def run(model):
        outputs = []
        for rows, columns in ((4, 4), (2, 8), (4, 4), (2, 8)):
            dbcache.refresh_context(model)
            outputs += denoise(model, steps=range(16), ids=ids_of(rows, columns))
            decided.append(traces(model))
        return outputs

    model, _ = both(run, FLUX.build, **options("seacache"), mode=mode)
    assert decided[:4] == decided[4:]
    assert decided[0][0][3] != decided[1][0][3]
    assert len(recordings(model)) == 2
    assert graphs(model).replays == 4 * 16 - 2


def test_the_ids_are_read_once_per_request_by_recorded_steps(driver, monkeypatch):
    model = dbcache.enable(FLUX.build(), **options("seacache"), cuda_graph="device")
    denoise(model, steps=range(4))
    reads, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: reads.append(x.shape) or cpu(x))
    dbcache.refresh_context(model)
    denoise(model)
    assert reads == [IDS.shape]


def fails_in_the_driver(monkeypatch):
    """Make the next launch fail."""
    launch = FakeDriver.do_cuGraphLaunch

    def fail(self, *args):
        monkeypatch.setattr(FakeDriver, "do_cuGraphLaunch", launch)
        return Result.CUDA_ERROR_INVALID_VALUE

    monkeypatch.setattr(FakeDriver, "do_cuGraphLaunch", fail)


def fails_after_the_branch(monkeypatch):
    """Make the third segment of the next replay fail."""
    replay, done = Tape.replay, []

    def fail(self):
        done.append(self)
        if len(done) == 3:
            monkeypatch.setattr(Tape, "replay", replay)
            raise RuntimeError("out of order")
        replay(self)

    monkeypatch.setattr(Tape, "replay", fail)


@pytest.mark.parametrize(
    ("mode", "break_next"), [("host", fails_after_the_branch), ("device", fails_in_the_driver)]
)
@pytest.mark.parametrize("policy", THRESHOLDS)
def test_a_failed_step_is_repeated_as_an_eager_one(driver, monkeypatch, policy, mode, break_next):
    """Nothing that was measured or kept before it holds any more, the rate included."""
    failed = []

    def run(model):
        def break_step(step):
            if step != 12 or model in failed:
                return {}
            failed.append(model)
            given = FLUX.arguments(start(9), 0.5, "cond")
            if graphs(model) is not None:
                break_next(monkeypatch)
                with pytest.raises(RuntimeError, match=r"out of order|cuGraphLaunch"):
                    model(**given)
                return {}
            hook = model.norm_out.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**given)
            hook.remove()
            return {}

        return denoise(model, how=break_step)

    model, ((_, _, reasons, diffs, _),) = both(run, FLUX.build, **options(policy), mode=mode)
    assert len(failed) == 2
    full = 2 if policy == "easycache" else 1
    assert reasons[12 : 12 + full] == ["no reference"] * full
    assert 12 + full in diffs
    assert cached_steps(model) & set(range(13, STEPS))
    assert graphs(model).replays == STEPS - 1


def test_a_forced_full_step_voids_the_rate(driver):
    def run(model):
        outputs = denoise(model, steps=range(15))
        inside.request(model).force_full("the test wants it")
        return outputs + denoise(model, steps=range(15, STEPS))

    model, ((_, _, reasons, *_),) = both(run, FLUX.build, **options("easycache"), mode="device")
    assert reasons[15:17] == ["no reference"] * 2
    assert cached_steps(model) & set(range(17, STEPS))


@pytest.mark.parametrize("policy", THRESHOLDS)
def test_they_are_recorded_ahead_of_the_first_request(driver, policy):
    expected = dbcache.enable(FLUX.build(), **options(policy))
    outputs = denoise(expected)
    model = dbcache.enable(FLUX.build(), **options(policy), cuda_graph="device")
    given = FLUX.arguments(start(1), 1.0, "cond")
    (recording,) = dbcache.capture(model, **given)
    assert recording.name.startswith("device, 1x16x16 float32")
    before = graphs(model).replays
    assert same(denoise(model), outputs)
    assert traces(model) == traces(expected)
    assert graphs(model).replays == before + STEPS


# --- the user's own capture ---

SHORT = 20


@pytest.mark.parametrize(
    ("policy", "version"), [("easycache", 12060), *((policy, 13000) for policy in THRESHOLDS)]
)
def test_a_captured_loop_decides_inside(capture, policy, version):
    model, fake = FLUX.build(), FakeDriver(version)
    settings = options(policy) | {"max_warmup_steps": 3, "num_inference_steps": SHORT}
    dbcache.enable(model, **settings)
    loop = Loop(model, SHORT)
    expected = {seed: loop.run(seed) for seed in (1, 2)}
    graph = capture(fake, loop.whole)
    nodes_per_step = 1 if version >= 12080 else 2
    assert conditional_nodes(graph.graph) == nodes_per_step * (SHORT - 3)
    for seed, run in expected.items():
        assert agree(loop.replay(graph, seed), run)
        assert "below threshold" in run[1][0][2]


@pytest.mark.parametrize("policy", THRESHOLDS)
def test_one_captured_step_serves_all_steps(capture, policy):
    model = FLUX.build()
    dbcache.enable(model, **options(policy), num_inference_steps=SHORT)
    loop = Loop(model, SHORT)
    expected = {seed: loop.run(seed) for seed in (1, 2)}
    dbcache.refresh_context(model)
    graph = capture(FakeDriver(), loop.one)
    for seed, run in expected.items():
        assert agree(loop.replay_steps(graph, seed), run)


@pytest.mark.parametrize("policy", ["dbcache", *THRESHOLDS])
def test_a_step_that_is_to_serve_all_needs_one_of_its_shape_before_it(capture, policy):
    model, few = FLUX.build(), ids_of(3, 4)
    settings = {"policy": policy} if policy == "dbcache" else options(policy)
    dbcache.enable(model, **settings)
    expected = denoise(model, steps=range(4))
    given = FLUX.arguments(start(1)[:, :12], 1.0, "cond") | {"img_ids": few}
    if policy == "seacache":  # or else it is missed first
        inside.stacks(model)[0].source.kind_of(Call(model, (), given))
    dbcache.refresh_context(model)
    with pytest.raises(RuntimeError, match=r"serve all steps.*run a step before the capture"):
        capture(FakeDriver(), lambda: torch.no_grad()(model)(**given))
    # nothing was changed
    dbcache.refresh_context(model)
    assert same(denoise(model, steps=range(4)), expected)


def test_a_capture_needs_a_step_before_it(capture):
    model = dbcache.enable(FLUX.build(), **options("easycache"))
    loop = Loop(model, steps=4)
    with pytest.raises(RuntimeError, match=r"FluxTransformer2DModel: a step must have run before"):
        capture(FakeDriver(), loop.whole)
    loop.whole()


@pytest.mark.parametrize("case", ["another tensor", "written to since"])
def test_the_size_of_the_latents_must_be_known_before_a_capture(capture, case):
    model = dbcache.enable(FLUX.build(), **options("seacache"))
    loop, fake = Loop(model, steps=4), FakeDriver()
    loop.whole()
    if case == "another tensor":
        loop.given["img_ids"] = loop.given["img_ids"].clone()
    else:
        loop.given["img_ids"].mul_(1)
    with pytest.raises(RuntimeError, match="run a step with the same tensor as img_ids before the"):
        capture(fake, loop.whole)
    loop.whole()  # the model works on, and has read them now
    capture(fake, loop.whole)
