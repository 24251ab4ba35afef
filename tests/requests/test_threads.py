"""Pipelines in threads that share their transformers: each image as if it were alone."""

import functools
import threading
import time
from contextlib import nullcontext

import inside
import pytest
import tiny
import torch
from graph_runs import Step
from together import FLUX, decisions, in_threads, same, siblings

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig, TaylorSeerCalibratorConfig
from dbcache.adapters.requests.cached_transformer import CachedTransformer

THREADS = 4
ALWAYS = {"Fn_compute_blocks": 1, "max_warmup_steps": 2}

CASES = {
    "flux": ("flux", DBCacheConfig(**ALWAYS, residual_diff_threshold=0.3), None),
    "qwen": ("qwen", DBCacheConfig(**ALWAYS, residual_diff_threshold=0.3), None),
    "wan2.2": ("wan2.2", DBCacheConfig(**ALWAYS, residual_diff_threshold=0.3), None),
    "wan taylor": (
        "wan",
        DBCacheConfig(**ALWAYS, residual_diff_threshold=0.3),
        TaylorSeerCalibratorConfig(taylorseer_order=1),
    ),
    "easycache": (
        "qwen",
        DBCacheConfig(policy="easycache", max_warmup_steps=2, residual_diff_threshold=0.2),
        None,
    ),
    "dbprune": ("flux", DBPruneConfig(**ALWAYS, residual_diff_threshold=0.15), None),
}
ROUNDS = pytest.mark.parametrize(
    "rounds", [2, pytest.param(20, marks=pytest.mark.slow)], ids=["short", "long"]
)


def image(pipe, number):
    """Return the latents of all steps of one of several images, which differ in their steps."""
    return tiny.generate(pipe, 7 + number % 3, guided=number != 3, seed=10 + number)


@functools.cache
def alone(case):
    """Return the images of a pipeline that nothing else shares; some of their steps are cached."""
    name, config, calibrator = CASES[case]
    pipe = dbcache.enable(tiny.pipeline(name), config, calibrator)
    images = [image(pipe, number) for number in range(THREADS)]
    assert any("c" in lane for lane in decisions(pipe))
    return images


@ROUNDS
@pytest.mark.parametrize("case", CASES)
def test_images_in_four_threads_are_those_of_requests_alone(case, rounds):
    name, config, calibrator = CASES[case]
    expected = alone(case)
    pipes = siblings(tiny.pipeline(name), THREADS)
    for pipe in pipes:
        dbcache.enable(pipe, config, calibrator)

    def work(number):
        return [same(image(pipes[number], number), expected[number]) for _ in range(rounds)]

    got = in_threads([lambda n=n: work(n) for n in range(THREADS)])
    assert got == [[True] * rounds] * THREADS
    for pipe in pipes:
        dbcache.disable(pipe)
    assert "_dbcache" not in pipes[0].transformer.__dict__


@pytest.mark.parametrize(
    "rounds", [1, pytest.param(20, marks=pytest.mark.slow)], ids=["short", "long"]
)
@pytest.mark.filterwarnings("ignore:.*outside of a call of the pipeline")
@pytest.mark.parametrize("case", CASES)
def test_pipelines_that_were_never_enabled_stay_plain_beside_one_that_was(case, rounds):
    name, config, calibrator = CASES[case]
    pipes = siblings(tiny.pipeline(name), THREADS)
    expected = [image(pipe, number) for number, pipe in enumerate(pipes)]
    expected[0] = alone(case)[0]
    dbcache.enable(pipes[0], config, calibrator)

    def work(number):
        return [same(image(pipes[number], number), expected[number]) for _ in range(rounds)]

    got = in_threads([lambda n=n: work(n) for n in range(THREADS)])
    assert got == [[True] * rounds] * THREADS


@ROUNDS
def test_each_pipeline_goes_by_its_own_options(rounds):
    settings = [
        {"residual_diff_threshold": 0.25},
        {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 2},
        {"residual_diff_threshold": 0.3, "taylorseer_order": 1, "enable_taylorseer": True},
        {"residual_diff_threshold": 0.3, "Fn_compute_blocks": 2, "Bn_compute_blocks": 1},
    ]
    expected = []
    for number, options in enumerate(settings):
        pipe = dbcache.enable(tiny.pipeline("flux"), **ALWAYS | options)
        expected.append((image(pipe, number), decisions(pipe)))
    assert len({str(trace) for _, trace in expected}) == THREADS
    pipes = siblings(tiny.pipeline("flux"), THREADS)
    for pipe, options in zip(pipes, settings, strict=True):
        dbcache.enable(pipe, **ALWAYS | options)

    def work(number):
        latents, trace = expected[number]
        return [
            (same(image(pipes[number], number), latents), decisions(pipes[number]) == trace)
            for _ in range(rounds)
        ]

    got = in_threads([lambda n=n: work(n) for n in range(THREADS)])
    assert got == [[(True, True)] * rounds] * THREADS


def test_summaries_and_counters_are_read_while_requests_begin_and_end():
    model = dbcache.enable(tiny.flux(), **ALWAYS)
    until = time.monotonic() + 2

    @torch.no_grad()
    def step():
        for branch in ("cond", "uncond"):
            with model.cache_context(branch):
                model(**FLUX.arguments(tiny.noise(*FLUX.latent_shape, seed=1), 1.0, branch))

    def begin():
        while time.monotonic() < until:
            requests = [dbcache.start_request(model, num_inference_steps=4) for _ in range(8)]
            thread = threading.Thread(target=step)  # begins a request of its own
            thread.start()
            with requests[0]:
                step()
            thread.join()

    def look():
        seen = 0
        while time.monotonic() < until:
            seen += bool(dbcache.summary(model, logging=False).lanes)
            dbcache.counters()
        return seen

    _, _, *seen = in_threads([begin, begin, look, look])
    assert all(seen)
    assert len(inside.handle(model)._open) == 0  # those that were dropped count no more


def test_pipelines_that_wait_for_each_others_transformers_do_not_wait_for_ever(monkeypatch):
    one, two = siblings(tiny.pipeline("wan2.2"), 2)
    two.transformer, two.transformer_2 = one.transformer_2, one.transformer
    for pipe in (one, two):
        dbcache.enable(pipe, **ALWAYS, max_requests=1)
    expected = [tiny.generate(pipe, 4) for pipe in (one, two)]
    enter = CachedTransformer.open

    def slowly(self, *args, **kwargs):
        request = enter(self, *args, **kwargs)
        time.sleep(0.05)
        return request

    monkeypatch.setattr(CachedTransformer, "open", slowly)
    got = in_threads([lambda p=p: tiny.generate(p, 4) for p in (one, two)])
    assert all(map(same, got, expected))


class Unnamed(torch.nn.Module):
    """A block whose source does not tell which parameter is the stream."""

    def __init__(self, seed):
        super().__init__()
        self.inner = Step(seed)

    def forward(self, x):
        return self.inner(x)


class Chain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Unnamed(seed) for seed in range(6))

    def forward(self, hidden_states, timestep=None):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@torch.no_grad()
@pytest.mark.parametrize("is_started", [False, True])
def test_blocks_may_be_learned_by_several_threads_at_once(is_started):
    def chain():
        options = ALWAYS | {"residual_diff_threshold": 0.5}
        return dbcache.enable(dbcache.BlockAdapter(transformer=Chain(), auto=True), **options)

    def image(adapter, seed):
        model, x, outputs = adapter.transformer, tiny.noise(1, 8, 4, seed=seed), []
        request = nullcontext()
        if is_started:
            request = dbcache.start_request(model, num_inference_steps=6)
        with torch.no_grad(), request:
            for step in range(6):
                x = model(x, timestep=1 - step / 6)
                outputs.append(x)
        return outputs

    expected = []
    for seed in range(THREADS):
        adapter = chain()
        expected.append(image(adapter, seed))
    if not is_started:
        assert "c" in decisions(adapter.transformer)[0]
    for _ in range(15):
        adapter = chain()
        got = in_threads([lambda s=seed, a=adapter: image(a, s) for seed in range(THREADS)])
        assert all(map(same, got, expected))
        assert len(inside.handle(adapter.transformer).setup.stacks) == 1
