"""Calls that fill a model's own cache of keys and values: every block runs, a new loop begins."""

import diffusers
import models
import pytest
import tiny
import torch

import dbcache
from dbcache.adapters.models.table import MODELS

FORCED = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 1,
    "residual_diff_threshold": 1.0,
    "enable_separate_cfg": False,
}


def far_fill(arguments):
    """Return the call that keeps both chunks, and what it writes into."""
    call = arguments | {
        "hidden_states": tiny.noise(1, 4, 4, 4, 4, seed=31),
        "timestep": torch.zeros(1, 4),
        "r_timestep": torch.zeros(1, 4),
        "kv_cache_flag": {"is_cache_step": True, "num_cached_chunks": 1},
    }
    return call, lambda: [layer["full_cache"] for layer in call["kv_cache"]]


def refiner_fill(arguments):
    """Return the call that keeps the first frames, and what it writes into."""
    call = arguments | {"kv_cache_mode": "capture_pre_rope"}
    return call, lambda: [layer.captured_k_pre for layer in call["kv_cache"].layer_caches]


def animate_fill(arguments):
    """Return the call that keeps the driving video, and what it writes into."""
    grid = arguments["reference_grid_sizes"]
    call = arguments | {"kv_cache_mode": "extract", "offset_grid_sizes": grid}
    return call, lambda: [layer.key for layer in call["kv_cache"].layer_caches]


FILLS = {
    "AnyFlowFARTransformer3DModel": far_fill,
    "SanaWMLTX2RefinerTransformer3DModel": refiner_fill,
    "WanAnimate2Transformer3DModel": animate_fill,
}


@pytest.fixture(params=FILLS)
def name(request):
    if not hasattr(diffusers, request.param):
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    yield request.param
    dbcache.disable(models.model(request.param))


def fill(name):
    """Make the call that fills; return the keys that it kept."""
    case = models.CASES[name]
    x = tiny.noise(*case.latent, seed=30)
    call, kept = FILLS[name](case.call_arguments(x, torch.tensor([0.0])))
    with torch.no_grad():
        models.model(name)(**call)
    return [tensor.clone() for tensor in kept()]


def test_every_row_that_tells_filling_calls_has_a_test():
    own = {"GlmImageTransformer2DModel"}  # tests/adapters/test_key_value_caches.py
    assert {row.transformer for row in MODELS if row.fills is not None} == FILLS.keys() | own


def test_a_filling_call_runs_every_block_and_keeps_what_the_plain_model_keeps(name):
    plain = fill(name)
    dbcache.enable(models.model(name), **FORCED)
    models.run(name, 2, seeds=[1, 2])
    calls = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(models.stacks_of(name)[0])
    ]
    kept = fill(name)
    for hook in hooks:
        hook.remove()
    assert calls == list(range(len(models.stacks_of(name)[0])))
    assert all(map(torch.equal, kept, plain))


def test_the_steps_after_a_filling_call_begin_anew(name):
    (plain,) = models.run(name, 1, seeds=[3])
    model = models.model(name)
    dbcache.enable(model, **FORCED)
    models.run(name, 3, seeds=[1, 2, 3])
    assert dbcache.summary(model).lanes[0].cached_steps == [1, 2]
    fill(name)
    assert torch.equal(models.run(name, 1, seeds=[3])[0], plain)
    models.run(name, 1, seeds=[4])
    (lane,) = dbcache.summary(model).lanes
    assert (lane.steps, lane.cached_steps) == (2, [1])


def test_no_cache_of_keys_and_values_is_none_to_fill():
    """`kv_caches=None` is GLM-Image's own default."""
    name = "GlmImageTransformer2DModel"
    if not hasattr(diffusers, name):
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    model = models.model(name)
    dbcache.enable(model, **FORCED)
    outputs = models.run(name, 3)
    dbcache.enable(model, **FORCED)
    given = models.run(name, 3, more=lambda step: {"kv_caches": None})
    assert all(map(torch.equal, given, outputs))
    assert dbcache.summary(model).lanes[0].cached_steps == [1, 2]
    dbcache.disable(model)
