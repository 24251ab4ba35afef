"""Tuning on the trained model with few steps: better than what policies choose, in seconds."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pipelines
import pytest
import tiny
import torch
from graph_runs import same

import dbcache
from dbcache.cli import main
from dbcache.demo import digits
from dbcache.tuning.closed_loop import ClosedLoop
from dbcache.tuning.errors import measure_pairs, parts_of_outputs, scheduler_response
from dbcache.tuning.problem import Fit, Problem
from dbcache.tuning.progress import Progress
from dbcache.tuning.recording import Store, record
from dbcache.tuning.rows import Row, Runner, frame_of
from dbcache.tuning.search import Search, dynamic_program, even
from dbcache.tuning.tuner import Tuner

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 16


@pytest.fixture(scope="module")
def pipe():
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawing(seed: int, steps: int = STEPS, **guidance):
    """Return a function that draws a digit."""

    def draw(pipe):
        arguments = digits.prompt([seed % 10], **guidance)
        generator = torch.Generator().manual_seed(seed)
        return digits.decode(
            pipe(**arguments, num_inference_steps=steps, generator=generator).images
        )

    return draw


@pytest.fixture(scope="module")
def recorded(pipe):
    return record(pipe, drawing(0), Store("cpu", lambda text: None))


@pytest.fixture(scope="module")
def problem(pipe, recorded):
    found = Problem()
    found.add(measure_pairs(pipe, recorded))
    return found


def test_a_tuned_row_is_closer_than_a_policy_and_holds_elsewhere(pipe, tmp_path):
    path, plain = tmp_path / "digits.json", drawing(7)(pipe)
    content = dbcache.tune(
        pipe,
        [drawing(seed) for seed in range(4)],
        full_steps=[8, 6],
        path=path,
        budget_minutes=0.1,
        progress=False,
    )
    assert not dbcache.is_enabled(pipe)
    assert json.loads(path.read_text()) == content
    assert [row["full"] for row in content["rows"]] == [8, 6]
    assert content["held_out"]
    assert content["validated_on"] == 1

    def quality(**options):
        dbcache.enable(pipe, **options)
        picture = drawing(7)(pipe)
        cached = len(dbcache.summary(pipe, logging=False).lanes[0].cached_steps)
        dbcache.disable(pipe)
        return cached, -10 * np.log10((picture - plain).square().mean().item())

    cached, tuned = quality(schedule=path, target="6 full")
    assert cached == STEPS - 6
    others = [
        quality(policy="easycache", residual_diff_threshold=x, max_warmup_steps=2, enable_foca=True)
        for x in (0.05, 0.08, 0.12)
    ]
    assert all(tuned > psnr + 3 for cached, psnr in others if cached >= STEPS - 6)
    assert any(cached >= STEPS - 6 for cached, _ in others)
    assert quality(schedule=path, target="8 full")[1] > tuned


class Clock:
    """Stands in for the time: each reading takes a moment, each draw as long as it is told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.25
        return self.now

    def slow(self, draw):
        """Return a draw that takes 8 s, and less on cached steps."""

        def drawn(pipe):
            output = draw(pipe)
            cached = 0
            if dbcache.is_enabled(pipe):
                cached = len(dbcache.summary(pipe, logging=False).lanes[0].cached_steps)
            self.now += 8.0 * (1 - cached / 12)
            return output

        return drawn


@pytest.mark.parametrize("minutes", [4.0, 6.0])
def test_the_time_is_kept_and_targets_are_met(pipe, monkeypatch, minutes):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    draws = [clock.slow(drawing(seed, 12)) for seed in range(4)]
    wanted = {"target_psnr": 36.0} if minutes > 5 else {"target_speedup": 2.0}
    content = dbcache.tune(pipe, draws, **wanted, budget_minutes=minutes, progress=False)
    assert clock.now <= 1.1 * 60 * minutes
    (row,) = content["rows"]
    if minutes > 5:
        assert row["psnr"]["mean"] >= 36.0
        assert row["full"] < 12
    else:
        assert 1.95 <= row["speedup"]["expected"] <= 2.1


def test_the_scheduler_answers_an_impulse_with_its_step(recorded):
    sigmas = recorded.scheduler.sigmas
    steps = (sigmas[1:] - sigmas[:-1]).tolist()
    assert scheduler_response(recorded) == pytest.approx(steps, rel=1e-5)


def test_guidance_weighs_the_branches(pipe):
    guided = record(pipe, drawing(0, 3, guidance=2.5), Store("cpu", lambda text: None))
    parts = parts_of_outputs(guided)
    assert parts[(0, "cond"), 1] == pytest.approx([2.5], rel=1e-4)
    assert parts[(0, "uncond"), 1] == pytest.approx([-1.5], rel=1e-4)


def test_a_repeated_call_with_another_residual_is_what_a_cached_step_gives(pipe, recorded):
    pairs = measure_pairs(pipe, recorded)
    calls = recorded.calls[0, "cond"]
    mask = [1] * STEPS
    mask[5] = 0
    dbcache.enable(
        pipe,
        steps_computation_mask=mask,
        steps_computation_policy="static",
        static_skip_probe=True,
    )
    outputs = []
    hook = pipe.transformer.register_forward_hook(lambda m, a, output: outputs.append(output[0]))
    drawing(0)(pipe)
    hook.remove()
    dbcache.disable(pipe)
    change = scheduler_response(recorded)[5] * (outputs[5] - calls[5].output)
    row = pairs.rows[pairs.index[(0, "cond"), 5, 4]]
    torch.testing.assert_close(row, change.flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["device", "fp8"])
def test_residuals_are_kept_where_they_fit(pipe, where):
    said = []
    other = record(pipe, drawing(0, 4), Store(where, said.append))
    assert len(said) == 1
    assert "residuals of one picture" in said[0]
    exact = record(pipe, drawing(0, 4), Store("cpu", lambda text: None))
    expected = exact.calls[0, "cond"][2].residuals[0][0]
    got = torch.empty_like(expected)
    Store.get(other.calls[0, "cond"][2].residuals[0][0], got)
    error = (got - expected).norm() / expected.norm()
    assert error < (0.05 if where == "fp8" else 1e-7)


def test_the_closed_loop_brings_rows_closer(pipe, recorded, problem, monkeypatch):
    lane, draw = (0, "cond"), drawing(0)
    runner = Runner(pipe, frame_of(pipe, recorded, ["FluxTransformer2DModel"], STEPS, 4))
    loop = ClosedLoop(runner, problem, [draw], Progress(9.0, shows=False))
    masks = {lane: (1,) * 5 + (0,) * (STEPS - 5)}
    row = Row(masks, problem.weights(masks, Fit()))
    row.chosen = loop.quality(row)
    assert loop.improve(row, seconds=0.9, cost=1.0) is row  # no time
    monkeypatch.setattr(time, "perf_counter", Clock())
    moved = loop.improve(row, seconds=12.0, cost=1.0)
    assert sum(moved.masks[lane]) == 5
    assert moved.chosen > row.chosen + 0.5
    values, _ = runner.run(Row(moved.masks, moved.weights), draw)
    assert values == pytest.approx([moved.chosen], abs=0.1)


def test_weights_solve_the_normal_equations(problem):
    """Against NumPy's least squares on the errors themselves."""
    lane = (0, "cond")
    mask = tuple(int(call in (0, 1, 4, 8, 12, 15)) for call in range(STEPS))
    weights = problem.weights({lane: mask}, Fit(snapshots=3, mu=0.0, ridge=0.0))[lane]
    for values in weights.values():
        assert sum(values) == pytest.approx(1.0)
    gram, ids = problem.gram, problem._ids[lane]

    def left(weights):
        rows = [
            (ids[c, s], w)
            for c, ws in weights.items()
            for s, w in zip(problem.ring(mask, 3)[c], ws, strict=True)
        ]
        index, values = [r for r, _ in rows], np.array([w for _, w in rows])
        return values @ gram[np.ix_(index, index)] @ values

    best = left(weights)
    assert best > 0
    for call in (2, 6, 10):
        for sign in (1, -1):
            moved = list(weights[call])
            moved[0] += sign * 1e-3
            moved[1] -= sign * 1e-3
            assert left({**weights, call: tuple(moved)}) > best


def test_the_search_improves_on_its_starts(problem):
    lane, fit = (0, "cond"), Fit()
    path = dynamic_program(problem, lane, 0.1)
    assert set(path) >= {4, 6, 8}
    assert all(sum(mask) == count and mask[0] for count, mask in path.items())
    found = Search(problem, fit).run([6], [[path[6]]], seconds=5.0, moves=150)
    assert sum(found.masks[lane]) == 6
    for start in (even(STEPS, 6), path[6]):
        assert found.score <= problem.score({lane: start}, fit)
    assert found.score < problem.score({lane: even(STEPS, 6)}, fit) - 0.5


def test_prompts_of_a_pipeline_and_what_is_refused(tmp_path):
    pipe = tiny.pipeline("flux")
    for options, error, text in (
        ({"prompts": []}, ValueError, "at least one"),
        ({"prompts": ["a"]}, ValueError, "num_inference_steps must be given"),
        ({"prompts": [3]}, TypeError, "a string, a mapping of arguments or a function"),
        ({"prompts": drawing(0), "budget_minutes": 0}, ValueError, "budget_minutes"),
        ({"prompts": drawing(0), "predictors": "x"}, ValueError, "predictors"),
        ({"prompts": drawing(0), "path": tmp_path / "no" / "x"}, FileNotFoundError, "make it"),
    ):
        given = {"num_inference_steps": 4} if options["prompts"] == [3] else {}
        with pytest.raises(error, match=text):
            dbcache.tune(pipe, **options, **given, progress=False)
    dbcache.enable(pipe)
    with pytest.raises(RuntimeError, match="must be off"):
        dbcache.tune(pipe, drawing(0))
    dbcache.disable(pipe)
    plain = tiny.generate(pipe, 6, guided=False)
    text_given = {
        "prompt_embeds": tiny.noise(1, 6, 24, seed=1),
        "pooled_prompt_embeds": tiny.noise(1, 12, seed=2),
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    with pytest.warns(UserWarning, match="too few to hold one out"):
        content = dbcache.tune(
            pipe,
            text_given,
            full_steps=3,
            num_inference_steps=6,
            budget_minutes=0.05,
            progress=False,
        )
    assert content["transformers"] == [{"model": "FluxTransformer2DModel", "calls": 6}]
    assert not content["held_out"]
    for target, text in (("target_psnr", "500 dB was not"), ("target_speedup", "500x was not")):
        with pytest.warns(UserWarning, match=f"{text} reached.*is taken: . full"):
            content = dbcache.tune(
                pipe, [text_given] * 3, num_inference_steps=6, budget_minutes=0.02, progress=False,
                **{target: 500},
            )  # fmt: skip
        assert [row["full"] for row in content["rows"]] == [5 if target == "target_psnr" else 1]
    assert same(tiny.generate(pipe, 6, guided=False), plain)


def test_branches_of_guidance_get_masks_of_their_own(pipe):
    content = dbcache.tune(
        pipe,
        [drawing(seed, 8, guidance=2.0) for seed in range(3)],
        full_steps=4,
        per_branch=True,
        guard=True,
        budget_minutes=0.05,
        progress=False,
    )
    branches = content["rows"][0]["transformers"][0]
    assert branches.keys() == {"cond", "uncond"}
    assert sum(entry["mask"].count("1") for entry in branches.values()) == 8
    for entry in branches.values():
        assert entry["changes"].keys() == {str(i) for i, x in enumerate(entry["mask"]) if x == "0"}
    dbcache.enable(pipe, schedule=content, guard=10.0)
    drawing(9, 8, guidance=2.0)(pipe)
    lanes = dbcache.summary(pipe, logging=False).lanes
    dbcache.disable(pipe)
    assert sum(len(lane.cached_steps) for lane in lanes) >= 4


@pytest.mark.parametrize("name", ["qwen", "wan2.2"])
def test_guided_pipelines_and_two_transformers_are_tuned(name):
    pipe = tiny.pipeline(name)

    def drawn(seed):
        return lambda pipe: tiny.generate(pipe, 6, seed=seed)[-1]

    content = dbcache.tune(
        pipe, [drawn(s) for s in (1, 2, 3)], full_steps=4, budget_minutes=0.02, progress=False
    )
    calls = [part["calls"] for part in content["transformers"]]
    assert sum(calls) == 6
    masks = [{e["mask"] for e in part.values()} for part in content["rows"][0]["transformers"]]
    assert [len(mask) for (mask,) in masks] == calls
    assert sum(mask.count("1") for (mask,) in masks) == 4
    dbcache.enable(pipe, schedule=content)
    tiny.generate(pipe, 6, seed=4)
    lanes = dbcache.summary(pipe, logging=False).lanes
    dbcache.disable(pipe)
    assert sum(len(lane.cached_steps) for lane in lanes) == 2 * 2


@pytest.mark.parametrize("name", ["HunyuanDiT", "LTX-2"])
def test_a_watched_scheduler_gives_the_pipeline_what_it_gives(name):
    """HunyuanDiT looks at what its scheduler takes; LTX-2 has a copy of it for the sound."""
    pipe = pipelines.build(name)

    def draw(pipe):
        return pipelines.draw(pipe, name, guided=True, steps=3, seed=1)

    plain = draw(pipe)
    recorded = record(pipe, draw, Store("cpu", lambda text: None))
    assert torch.equal(recorded.output, plain)
    assert len(recorded.steps) == 3


@pytest.mark.parametrize("best", ["weights", "foca"])
def test_auto_takes_what_is_closest_weights_or_none(best):
    lane = (0, None)
    tuner = object.__new__(Tuner)
    tuner.predictors, tuner.fit = "auto", Fit()
    tuner.problem = SimpleNamespace(weights=lambda masks, fit: {lane: {1: fit.ridge}})
    is_best = {"weights": lambda row: bool(row.weights), "foca": lambda row: not row.weights}[best]
    tuner.loop = SimpleNamespace(draws=[None], quality=lambda row: 50.0 if is_best(row) else 40.0)
    chosen = tuner.choose(Row({lane: (1, 0)}, {lane: {1: 0.5}}), cost=1.0, seconds=60.0)
    assert is_best(chosen)


def test_several_numbers_of_steps_and_targets_go_into_one_file(pipe, tmp_path, capsys):
    path = tmp_path / "both.json"
    command = ["tune", "digits", "--pictures", "3", "--steps", "8", "6", "--minutes", "0.05"]
    assert main([*command, "--full-steps", "4", "--psnr", "12", "--out", str(path), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["of", "full"]
    file = json.loads(path.read_text())
    assert [each["num_inference_steps"] for each in (file, *file["others"])] == [6, 8]
    for each in (file, *file["others"]):
        assert {row["full"] for row in each["rows"]} >= {4}
        assert min(row["full"] for row in each["rows"]) <= 4
    dbcache.enable(pipe, schedule=path, target="4 full")
    for steps in (8, 6):
        drawing(5, steps)(pipe)
        assert len(dbcache.summary(pipe, logging=False).lanes[0].cached_steps) == steps - 4
    dbcache.disable(pipe)
    for steps, text in (([8, 8], "different numbers"), ([8, 6], "as their second argument says")):
        with pytest.raises(ValueError, match=text):
            dbcache.tune(
                pipe,
                [lambda pipe, steps, seed=seed: drawing(seed, 4)(pipe) for seed in range(3)],
                full_steps=3,
                num_inference_steps=steps,
                budget_minutes=0.02,
                progress=False,
            )
