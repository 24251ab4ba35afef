"""Pipelines that make a video piece by piece: each piece is a request of its own."""

import diffusers
import models
import pipelines
import pytest
import torch
from model_case import find_class
from recipes_video import PIECES

import dbcache

STEPS = 6
RHYTHM = "FFccFc"
FORCED = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 1.0,
    "max_continuous_cached_steps": 2,
}
COUNTS = {"Helios": (2, 0), "Framepack": (2, 0), "AnyFlow-FAR": (3, 2)}
"""The pieces, and the calls in between that keep keys and values."""


@pytest.fixture(params=PIECES)
def name(request, monkeypatch):
    recipe = PIECES[request.param]
    if not hasattr(diffusers, recipe.pipeline) or find_class(recipe.transformer) is None:
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    monkeypatch.setitem(pipelines.RECIPES, request.param, recipe)
    return request.param


@torch.no_grad()
def draw(pipe, name, guided):
    """Return the latents of all pieces."""
    recipe = PIECES[name]
    if recipe.prepare is not None:
        recipe.prepare(pipe, guided)
    output = pipe(
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        return_dict=False,
        **pipelines.arguments(pipe, name, guided=guided),
    )[0]
    return list(output) if isinstance(output, list) else [output]


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_each_piece_is_a_request(name, guided):
    recipe, pipe = PIECES[name], pipelines.build(name)
    pieces, fills = COUNTS[name]
    branches = recipe.branches if guided else recipe.alone
    plain = draw(pipe, name, guided)

    dbcache.enable(pipe, Fn_compute_blocks=1, residual_diff_threshold=0.0)
    assert all(map(torch.equal, draw(pipe, name, guided), plain))

    dbcache.enable(pipe, **FORCED)
    calls = []
    block = models.stacks_of(recipe.transformer, pipe.transformer)[0][1]
    hook = block.register_forward_pre_hook(lambda *_: calls.append(None))
    cached = draw(pipe, name, guided)
    hook.remove()
    lanes, notes = pipelines.decisions(pipe), dbcache.summary(pipe).notes
    dbcache.disable(pipe)
    assert len(calls) == pieces * RHYTHM.count("F") * len(branches) + fills
    assert lanes == [(branch, RHYTHM) for branch in branches]
    assert [note.partition(": ")[2] for note in notes] == [
        f"the pipeline denoised {pieces} times, the last time is shown"
    ]
    for one, other in zip(cached, plain, strict=True):
        assert one.isfinite().all()
        assert not torch.equal(one, other)
