"""Whole tiny pipelines, guidance on and off: lanes, steps, cached steps, and what comes out."""

import contextlib

import diffusers
import models
import pipelines
import pytest
import torch
from model_case import find_class
from recipes import RECIPES
from replay import replayed

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


@pytest.fixture
def plain_kernels(monkeypatch):
    """Run the references of the kernels, not Triton's interpreter: these tests are about calls."""
    monkeypatch.setenv("DBCACHE_KERNELS", "reference")


@pytest.fixture(params=RECIPES)
def name(request):
    recipe = RECIPES[request.param]
    if not hasattr(diffusers, recipe.pipeline) or find_class(recipe.transformer) is None:
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    return request.param


def transformers_of(pipe):
    """Return the transformers of a pipeline, in the order they run."""
    return [pipe.transformer, *filter(None, [getattr(pipe, "transformer_2", None)])]


def decisions(pipe):
    """Return (branch, F for full and c for cached) of each lane, those of a stack together."""
    return [
        (lane.branch, "".join("c" if s in lane.cached_steps else "F" for s in range(lane.steps)))
        for lane in dbcache.summary(pipe).lanes
    ]


class Branched:
    """Gives the replays of a transformer's stacks a memory for each branch.

    Calls come in turn, one of each branch in a step.
    """

    def __init__(self, replays, branches):
        self.replays = replays
        self.memories = [[{} for _ in replays] for _ in range(branches)]
        self.calls = 0

    def __call__(self, *_):
        step, branch = divmod(self.calls, len(self.memories))
        self.calls += 1
        for replay, memory in zip(self.replays, self.memories[branch], strict=True):
            replay.outputs = memory.setdefault("outputs", [None] * len(replay.blocks))
            replay.cached = RHYTHM[step] == "c"
            replay.full_start = memory.get("start")

    def after(self, *_):
        """Keep what the last call left."""
        branch = (self.calls - 1) % len(self.memories)
        for replay, memory in zip(self.replays, self.memories[branch], strict=True):
            memory["start"] = replay.full_start


def replay(pipe, name, branches, guided):
    """Return what a plain-PyTorch replay of cached steps draws."""
    with contextlib.ExitStack() as context:
        for transformer in transformers_of(pipe):
            stacks = context.enter_context(replayed(RECIPES[name].transformer, 1, 0, transformer))
            branched = Branched(stacks, branches)
            for hook in (
                transformer.register_forward_pre_hook(branched),
                transformer.register_forward_hook(branched.after),
            ):
                context.callback(hook.remove)
        return pipelines.draw(pipe, name, guided=guided)


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
    expected = replay(pipe, name, len(branches), guided) if guided else None

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
