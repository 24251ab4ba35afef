"""The other pipelines that have FLUX.1's transformer: Kontext and Fill, with a tiny real VAE."""

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)

import dbcache

STEPS = 10


def build(cls, in_channels):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=4,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=tiny.TEXT_DIM,
        pooled_projection_dim=12,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        transformer=tiny.fill(transformer, seed=4),
        **text,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))


SMALL = {"max_area": 32 * 32}  # Kontext scales every picture to this area
PIPELINES = {
    "Kontext": (
        FluxKontextPipeline,
        4,
        lambda: {"image": picture(), "_auto_resize": False, **SMALL},
    ),
    "Kontext without image": (FluxKontextPipeline, 4, lambda: SMALL),
    "Fill": (
        FluxFillPipeline,
        4 + 4 + 16,  # latents, masked image, 4x4 mask of a VAE of factor 2
        lambda: {"image": picture(), "mask_image": (picture()[:, :1] > 0.5).float()},
    ),
}


@torch.no_grad()
def draw(pipe, more):
    return pipe(
        prompt_embeds=tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=11),
        pooled_prompt_embeds=tiny.noise(1, 12, seed=12),
        height=32,
        width=32,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        **more,
    ).images


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_is_cached_and_given_back(name):
    cls, in_channels, more = PIPELINES[name]
    pipe = build(cls, in_channels)
    plain = draw(pipe, more())
    dbcache.enable(pipe, Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.0)
    assert torch.equal(draw(pipe, more()), plain)
    dbcache.enable(
        pipe,
        Fn_compute_blocks=1,
        max_warmup_steps=2,
        residual_diff_threshold=1.0,
        max_continuous_cached_steps=1,
    )
    cached = draw(pipe, more())
    (lane,) = dbcache.summary(pipe).lanes
    assert lane.cached_steps == [2, 4, 6, 8]
    assert lane.steps == STEPS
    assert not torch.equal(cached, plain)
    assert (cached - plain).abs().mean() < 0.1
    dbcache.disable(pipe)
    assert type(pipe) is cls
    assert torch.equal(draw(pipe, more()), plain)


def test_controlnet_residuals_are_right_on_full_and_on_cached_steps():
    family, model = tiny.FAMILIES["flux"], tiny.flux()
    x = tiny.noise(*family.latent_shape, seed=5)
    control = {
        "controlnet_block_samples": [tiny.noise(1, 16, 32, seed=20 + i) for i in range(2)],
        "controlnet_single_block_samples": [tiny.noise(1, 16, 32, seed=30 + i) for i in range(3)],
    }

    def run():
        with torch.no_grad():
            return model(**family.arguments(x, 0.5, "cond"), **control)[0]

    plain = run()
    for bn in (0, 1, 7):  # the middle blocks end with the last one, before it, in the first list
        dbcache.enable(model, Fn_compute_blocks=1, Bn_compute_blocks=bn, max_warmup_steps=1)
        full, cached = run(), run()
        assert dbcache.summary(model).lanes[0].cached_steps == [1]
        assert torch.equal(full, plain)
        torch.testing.assert_close(cached, plain, rtol=1e-5, atol=1e-5)
