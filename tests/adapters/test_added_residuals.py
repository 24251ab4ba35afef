"""What is added between the blocks or inside of them (ControlNet, IP-Adapter, LoRA) with the cache.

Never caching gives the plain model's output; cached steps give that of a replay in plain PyTorch,
in which the model's own loop adds the residuals.
"""

import diffusers
import models
import pytest
import tiny
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from model_case import find_class
from replay import replayed

import dbcache

STEPS = 4
SETTINGS = {"F1B0": (1, 0), "F2B2": (2, 2), "F3B1": (3, 1)}


def residuals(count, *shape, step):
    """Return `count` residuals that change with the step."""
    return [tiny.noise(*shape, seed=100 * step + i) for i in range(count)]


CONTROLS = {
    "FluxTransformer2DModel": lambda step: {
        "controlnet_block_samples": residuals(2, 1, 16, 32, step=step),
        "controlnet_single_block_samples": residuals(3, 1, 16, 32, step=step),
    },
    "ChromaTransformer2DModel": lambda step: {
        "controlnet_block_samples": residuals(2, 1, 16, 32, step=step),
        "controlnet_single_block_samples": residuals(3, 1, 16, 32, step=step),
    },
    # its loop adds the second ones to the tokens behind the first 6, as many as the text has
    "BriaTransformer2DModel": lambda step: {
        "controlnet_block_samples": residuals(2, 1, 16, 32, step=step),
        "controlnet_single_block_samples": residuals(3, 1, 10, 32, step=step),
    },
    "QwenImageTransformer2DModel": lambda step: {
        "controlnet_block_samples": residuals(4, 1, 16, 32, step=step)
    },
    "SD3Transformer2DModel": lambda step: {
        "block_controlnet_hidden_states": residuals(3, 1, 16, 24, step=step)
    },
    "ZImageTransformer2DModel": lambda step: {
        "controlnet_block_samples": dict(
            zip((0, 3, 6, 9), residuals(4, 1, 64, 24, step=step), strict=True)
        )
    },
    "HunyuanDiT2DModel": lambda step: {
        "controlnet_block_samples": residuals(4, 1, 16, 32, step=step)
    },
    "SanaTransformer2DModel": lambda step: {
        "controlnet_block_samples": tuple(residuals(5, 1, 16, 24, step=step))
    },
    "SanaVideoTransformer3DModel": lambda step: {
        "controlnet_block_samples": tuple(residuals(5, 1, 8, 24, step=step))
    },
    "CosmosTransformer3DModel": lambda step: {
        "block_controlnet_hidden_states": residuals(4, 1, 8, 24, step=step)
    },
}
"""What a ControlNet hands to the transformer, by its class."""


@pytest.fixture(params=CONTROLS)
def name(request):
    if find_class(request.param) is None:
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    yield request.param
    dbcache.disable(models.model(request.param))


def enable(name, fn, bn, threshold):
    dbcache.enable(
        models.model(name),
        Fn_compute_blocks=fn,
        Bn_compute_blocks=bn,
        max_warmup_steps=1,
        residual_diff_threshold=threshold,
        enable_separate_cfg=False,
    )


def replay(name, fn, bn, more):
    """Return the outputs of a loop whose steps but the first are cached."""
    with replayed(name, fn, bn) as replays:
        outputs = []
        for step in range(STEPS):
            for one in replays:
                one.cached = step > 0
            outputs += models.run(name, 1, seeds=[step], more=lambda _, step=step: more(step))
    return outputs


def check(name, fn, bn, more, other=lambda step: {}):
    """Compare with the plain model and with the replay; arguments from `other` make a change."""
    seeds = list(range(STEPS))
    plain = models.run(name, STEPS, seeds, more)
    without = models.run(name, STEPS, seeds, other)
    assert all((x - y).abs().max() > 1e-3 for x, y in zip(plain, without, strict=True))
    enable(name, fn, bn, threshold=0.0)
    assert all(map(torch.equal, models.run(name, STEPS, seeds, more), plain))
    dbcache.disable(models.model(name))
    expected = replay(name, fn, bn, more)
    enable(name, fn, bn, threshold=1.0)
    for output, wanted in zip(models.run(name, STEPS, seeds, more), expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    for lane in dbcache.summary(models.model(name)).lanes:
        assert lane.cached_steps == [1, 2, 3]
    dbcache.disable(models.model(name))


@pytest.mark.parametrize("setting", SETTINGS)
def test_controlnet_residuals_are_right_on_full_and_on_cached_steps(name, setting):
    check(name, *SETTINGS[setting], CONTROLS[name])


def flux_adapter(model):
    """Give FLUX an adapter for one image, which its double blocks attend to."""
    model.encoder_hid_proj = MultiIPAdapterImageProjection(
        [ImageProjection(image_embed_dim=8, cross_attention_dim=32, num_image_text_embeds=2)]
    )
    new = {
        key: processor
        if "single" in key
        else FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, num_tokens=(2,))
        for key, processor in model.attn_processors.items()
    }
    model.set_attn_processor(new)


def sd3_adapter(model):
    """Give Stable Diffusion 3 an adapter for one image, whose states depend on the time."""
    model.image_proj = IPAdapterTimeImageProjection(
        embed_dim=8, output_dim=8, hidden_dim=8, depth=1, heads=1, num_queries=2, timestep_in_dim=8
    )
    new = {
        key: SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=24, ip_hidden_states_dim=8, head_dim=12, timesteps_emb_dim=8
        )
        for key in model.attn_processors
    }
    model.set_attn_processor(new)


ADAPTERS = {
    "FluxTransformer2DModel": (flux_adapter, "encoder_hid_proj", (1, 1, 8)),
    "SD3Transformer2DModel": (sd3_adapter, "image_proj", (1, 3, 8)),
}
"""What puts the adapter in, the attribute that it sets, and the shape of an image's embedding."""


@pytest.fixture(params=ADAPTERS)
def adapted(request):
    """Name of a model with an adapter; it is as it was afterwards."""
    put_in, attribute, _ = ADAPTERS[request.param]
    model = models.model(request.param)
    processors = model.attn_processors
    torch.manual_seed(0)
    put_in(model)
    yield request.param
    dbcache.disable(model)
    delattr(model, attribute)
    model.set_attn_processor(processors)


def image(name, seed):
    embeds = tiny.noise(*ADAPTERS[name][2], seed=seed)
    one = [embeds] if name.startswith("Flux") else embeds
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": one}}


@pytest.mark.parametrize("setting", SETTINGS)
def test_ip_adapter_images_are_right_on_full_and_on_cached_steps(adapted, setting):
    check(adapted, *SETTINGS[setting], lambda _: image(adapted, 9), lambda _: image(adapted, 8))


def test_another_scale_of_ip_adapters_makes_the_next_step_a_full_one(adapted):
    """As `pipe.set_ip_adapter_scale` in a callback."""
    scaled = [x for x in models.model(adapted).attn_processors.values() if hasattr(x, "scale")]

    def run(step):
        for processor in scaled[1:]:  # the first block's stays: no measured change shows it
            scale = 0.2 if step >= 3 else 1.0
            processor.scale = [scale] if isinstance(processor.scale, list) else scale
        return image(adapted, 9)

    enable(adapted, 1, 0, threshold=1.0)
    models.run(adapted, 6, list(range(6)), run)
    summary = dbcache.summary(models.model(adapted))
    assert {tuple(lane.cached_steps) for lane in summary.lanes} == {(1, 2, 4, 5)}
    assert "the scale of an adapter" in str(summary)


class Lora(torch.nn.Module):
    """A low-rank update beside a linear layer, as an adapter puts it in the layer's place."""

    def __init__(self, base, rank, seed):
        super().__init__()
        self.base = base
        self.down = tiny.noise(rank, base.in_features, seed=seed) / base.in_features**0.5
        self.up = tiny.noise(base.out_features, rank, seed=seed + 1)
        self.scale = 1.0

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.down.T @ self.up.T)


@pytest.mark.parametrize("setting", SETTINGS)
def test_adapters_put_in_after_the_cache_was_switched_on_count(setting):
    name = "QwenImageTransformer2DModel"
    model, (fn, bn) = models.model(name), SETTINGS[setting]
    seeds = list(range(STEPS))
    without = models.run(name, STEPS, seeds)
    enable(name, fn, bn, threshold=1.0)
    models.run(name, STEPS, seeds)
    bases = [block.attn.to_q for block in model.transformer_blocks]
    for i, block in enumerate(model.transformer_blocks):
        block.attn.to_q = Lora(bases[i], rank=2, seed=50 + i)
    for scale in (1.0, 0.5):
        for block in model.transformer_blocks:
            block.attn.to_q.scale = scale
        dbcache.refresh_context(model)
        cached = models.run(name, STEPS, seeds)
        dbcache.disable(model)
        plain = models.run(name, STEPS, seeds)
        assert (plain[0] - without[0]).abs().max() > 1e-3
        assert torch.equal(cached[0], plain[0])
        expected = replay(name, fn, bn, lambda step: {})
        for output, wanted in zip(cached, expected, strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
        enable(name, fn, bn, threshold=1.0)
    for base, block in zip(bases, model.transformer_blocks, strict=True):
        block.attn.to_q = base
    dbcache.disable(model)
