"""Whole tiny pipelines, guidance on and off: lanes, steps, cached steps, and what comes out."""

import contextlib

import diffusers
import models
import pipelines
import pytest
import torch
from model_case import find_class
from pipelines import RECIPES, decisions
from replay import replayed_calls

import dbcache

FORCED = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 1.0,
    "max_continuous_cached_steps": 2,
}
RHYTHM = "FFccFc"
"""What the steps of a lane are with these options: full or cached."""

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")


@pytest.fixture(params=RECIPES)
def name(request):
    recipe = RECIPES[request.param]
    if not hasattr(diffusers, recipe.pipeline) or find_class(recipe.transformer) is None:
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    return request.param


def transformers_of(pipe):
    """Return the transformers of a pipeline, in the order they run."""
    return [pipe.transformer, *filter(None, [getattr(pipe, "transformer_2", None)])]


def replay(pipe, name, branches):
    """Return what a plain-PyTorch replay of cached steps draws with guidance."""
    steps = [how == "c" for how in RHYTHM[: RECIPES[name].steps]]
    plan = [(branch, cached) for cached in steps for branch in range(branches)]
    with contextlib.ExitStack() as context:
        for transformer in transformers_of(pipe):
            context.enter_context(
                replayed_calls(RECIPES[name].transformer, 1, 0, transformer, plan)
            )
        return pipelines.draw(pipe, name, guided=True)


@contextlib.contextmanager
def counted(pipe, name):
    """Count the calls of the first middle block of each stack."""
    family = RECIPES[name].transformer
    first = [
        blocks[middle.start]
        for transformer in transformers_of(pipe)
        for blocks, middle in zip(
            models.stacks_of(family, transformer),
            models.middles_of(family, 1, 0, transformer),
            strict=True,
        )
    ]
    calls = [0] * len(first)

    def count(i):
        calls[i] += 1

    hooks = [
        block.register_forward_pre_hook(lambda *_, i=i: count(i)) for i, block in enumerate(first)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_pipeline_is_cached_in_lanes_of_its_own(name, guided):
    recipe, pipe = RECIPES[name], pipelines.build(name)
    branches = recipe.branches if guided else recipe.alone
    plain = pipelines.draw(pipe, name, guided=guided)
    expected = replay(pipe, name, len(branches)) if guided else None

    dbcache.enable(pipe, Fn_compute_blocks=1, residual_diff_threshold=0.0)
    assert torch.equal(pipelines.draw(pipe, name, guided=guided), plain)
    full = [(branch, "F" * recipe.steps) for branch in branches]
    stacks = len(decisions(pipe)) // len(branches)
    assert decisions(pipe) == full * stacks

    dbcache.enable(pipe, **FORCED)
    with counted(pipe, name) as calls:
        cached = pipelines.draw(pipe, name, guided=guided)
    rhythm = RHYTHM[: recipe.steps]
    assert decisions(pipe) == [(branch, rhythm) for branch in branches] * stacks
    assert dbcache.summary(pipe).notes == []
    assert calls == [rhythm.count("F") * len(branches)] * stacks
    assert cached.isfinite().all()
    assert (cached - plain).abs().max() > 1e-3
    if guided:
        torch.testing.assert_close(cached, expected, rtol=1e-3, atol=1e-4)
    dbcache.disable(pipe)
    assert type(pipe) is getattr(diffusers, recipe.pipeline)
    assert type(pipe.scheduler) is type(recipe.scheduler())


NEED_THE_STEPS = {
    "FFFcFccF": {"steps_computation_mask": "fast"},
    "FFFFcccc": {"retention_ratio": 0.5, "max_warmup_steps": 1},
    "FFcccccc": {"enable_spectrum": True, "max_warmup_steps": 2},
}
"""Options that hold for a known number of steps, by what they make of 8."""

SILENT = ["PRX", "PixArt-sigma", "Stable Audio", "DiT", "ERNIE-Image"]


@pytest.mark.parametrize("name", SILENT, indirect=True)
def test_the_scheduler_knows_the_steps_where_the_pipeline_does_not_tell(name):
    pipe = pipelines.build(name)
    for rhythm, options in NEED_THE_STEPS.items():
        dbcache.enable(pipe, Fn_compute_blocks=1, residual_diff_threshold=1.0, **options)
        pipelines.draw(pipe, name, guided=False, steps=8)
        assert {how for _, how in decisions(pipe)} == {rhythm}
    assert getattr(pipe, "_num_timesteps", None) is None
    dbcache.disable(pipe)
