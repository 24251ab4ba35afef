"""diffusers' own ways to a model: modular pipelines, and `enable_cache` of a transformer."""

import copy
from importlib import import_module

import diffusers
import models
import pytest
import tiny
import torch

import dbcache
from dbcache.integrations.diffusers import add_alias, remove_alias

FORCED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")


def text(seed):
    return tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=seed)


SMALL = {"height": 32, "width": 32}
MASK = torch.ones(1, tiny.TEXT_TOKENS, dtype=torch.long)
VIDEO = {
    "latents": tiny.noise(1, 4, 3, 8, 8, seed=3),
    "num_frames": 9,
    "height": 64,
    "width": 64,
    "prompt_embeds": text(1),
    "negative_prompt_embeds": text(2),
}
MODULAR = {
    "flux.modular_blocks_flux.FluxAutoBlocks": (
        {"transformer": tiny.flux},
        SMALL | {"prompt_embeds": text(1), "pooled_prompt_embeds": tiny.noise(1, 12, seed=2)},
        [None],
    ),
    "qwenimage.modular_blocks_qwenimage.QwenImageAutoBlocks": (
        {"transformer": tiny.qwen},
        SMALL
        | {"prompt_embeds": text(1), "negative_prompt_embeds": text(2)}
        | {"prompt_embeds_mask": MASK, "negative_prompt_embeds_mask": MASK},
        ["cond", "uncond"],
    ),
    "wan.modular_blocks_wan.WanBlocks": (
        {"transformer": tiny.wan},
        VIDEO,
        ["cond", "uncond"],
    ),
    "wan.modular_blocks_wan22.Wan22Blocks": (
        {"transformer": tiny.wan, "transformer_2": lambda: tiny.wan(seed=7)},
        VIDEO,
        ["cond", "uncond"] * 2,
    ),
    "z_image.modular_blocks_z_image.ZImageAutoBlocks": (
        {"transformer": lambda: models.model("ZImageTransformer2DModel")},
        SMALL | {"prompt_embeds": [text(1)[0]], "negative_prompt_embeds": [text(2)[0]]},
        [None],
    ),
}
"""Blocks of a modular pipeline: transformers, arguments of a call, and the lanes of a request.

Stable Diffusion 3 is in tests/adapters/test_guidance.py.
"""


def modular(path, transformers):
    module, _, name = path.rpartition(".")
    blocks = getattr(import_module(f"diffusers.modular_pipelines.{module}"), name)()
    for other in set(blocks.sub_blocks) - {"denoise"}:
        blocks.sub_blocks.pop(other)
    pipe = blocks.init_pipeline()
    pipe.update_components(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **{name: build() for name, build in transformers.items()},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("path", MODULAR, ids=lambda path: path.rpartition(".")[2])
def test_modular_pipelines_are_cached(path):
    transformers, arguments, branches = MODULAR[path]
    pipe = modular(path, transformers)

    @torch.no_grad()
    def draw(steps):
        generator = torch.Generator().manual_seed(5)
        return pipe(**arguments, num_inference_steps=steps, generator=generator, output="latents")

    plain = draw(8)
    dbcache.enable(pipe, **(FORCED | {"residual_diff_threshold": 0.0}))
    assert torch.equal(draw(8), plain)
    dbcache.enable(pipe, **FORCED)
    image = draw(8)
    assert not torch.equal(image, plain)
    lanes = list(dbcache.summary(pipe, logging=False))
    assert [lane.branch for lane in lanes] == branches
    assert sum(lane.steps for lane in lanes) == 8 * len(branches) // len(transformers)
    for lane in lanes:
        assert lane.cached_steps == list(range(2, lane.steps))
    assert torch.equal(draw(8), image)
    draw(5)
    assert sum(lane.steps for lane in dbcache.summary(pipe, logging=False)) == (
        5 * len(branches) // len(transformers)
    )
    if len(transformers) == 1:
        dbcache.enable(pipe, **FORCED, steps_computation_mask="fast")  # fitted to the steps
        draw(8)
        lanes = dbcache.summary(pipe, logging=False)
        assert all({3, 5, 6}.issuperset(lane.cached_steps) for lane in lanes)
        assert all(lane.cached_steps for lane in lanes)
    dbcache.disable(pipe)
    assert torch.equal(draw(8), plain)


def denoise(model, steps=8):
    return tiny.denoise(model, tiny.FAMILIES["flux"], steps, named=True)


def test_enable_cache_of_a_transformer_takes_dbcaches_config():
    model, other = tiny.flux(), tiny.flux()
    plain, own = denoise(model), dict(model.__dict__)
    config = dbcache.DBCacheConfig(**FORCED)
    dbcache.enable(other, config, num_inference_steps=8)
    expected = denoise(other)
    for _ in range(2):
        assert add_alias(model) is model
    with pytest.raises(ValueError, match="is not supported"):
        other.enable_cache(config)  # neither other transformers nor the class

    for _ in range(2):
        model.enable_cache(config, num_inference_steps=8)
        assert model.is_cache_enabled
        assert all(map(torch.equal, denoise(model), expected))
        with pytest.raises(ValueError, match=r"no other cache must be on.*disable_cache first"):
            model.enable_cache(config)
        with pytest.raises(ValueError, match="already been enabled"):
            model.enable_cache(diffusers.FirstBlockCacheConfig())
        model.disable_cache()
        assert not model.is_cache_enabled
        assert all(map(torch.equal, denoise(model), plain))

    # diffusers' own configs go on working, and the two are not mixed
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(ValueError, match="got FirstBlockCacheConfig"):
        model.enable_cache(config)
    model.disable_cache()
    for on, off in (  # each way to switch it on, with the other one to switch it off
        (lambda: model.enable_cache(config, num_inference_steps=8), lambda: dbcache.disable(model)),
        (lambda: dbcache.enable(model, config, num_inference_steps=8), model.disable_cache),
    ):
        on()
        assert (model.is_cache_enabled, dbcache.is_enabled(model)) == (True, True)
        assert all(map(torch.equal, denoise(model), expected))
        dbcache.refresh_context(model)
        with pytest.raises(ValueError, match="already been enabled"):
            model.enable_cache(diffusers.FirstBlockCacheConfig())
        twin = copy.deepcopy(model)
        assert (twin.is_cache_enabled, dbcache.is_enabled(twin)) == (False, False)
        assert all(map(torch.equal, denoise(twin), plain))
        off()
        assert (model.is_cache_enabled, dbcache.is_enabled(model)) == (False, False)
        assert all(map(torch.equal, denoise(model), plain))
        model.enable_cache(diffusers.FirstBlockCacheConfig())
        model.disable_cache()
    model.enable_cache(config, num_inference_steps=8)
    with pytest.raises(ValueError, match="policy must be one of"):
        dbcache.enable(model, policy="lazy")  # the cache stays as it was
    assert model.is_cache_enabled
    remove_alias(model)
    assert not dbcache.is_enabled(model)
    changed = {
        name for name in {**model.__dict__, **own} if model.__dict__.get(name) is not own.get(name)
    }
    assert changed <= {"_diffusers_hook"}
    with pytest.raises(ValueError, match="is not supported"):
        model.enable_cache(config)
    with pytest.raises(TypeError, match=r"use dbcache\.enable"):
        add_alias(torch.nn.Linear(1, 1))

    pipe = dbcache.enable(tiny.pipeline("flux"), config)
    assert add_alias(pipe.transformer).is_cache_enabled
    pipe.transformer.disable_cache()
    assert not dbcache.is_enabled(pipe)
