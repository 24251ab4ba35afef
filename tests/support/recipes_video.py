"""Recipes of further video pipelines, and of those that make a video piece by piece."""

from dataclasses import replace
from typing import Any

import diffusers
import tiny
from model_case import TEXT
from recipes import MASK, NAMED, ONE, PICTURE, SCALE, SMALL, TINY, TRUE_CFG, Part, Recipe

LARGE_PICTURE = tiny.noise(1, 3, 64, 64, seed=2).sigmoid()
FIVE = TINY | {"num_frames": 5}
POOLED = {"prompt_embeds": TEXT, "pooled_prompt_embeds": (1, 8)}


def wan_vae() -> diffusers.AutoencoderKLWan:
    """Return Wan's autoencoder, of 4 channels."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return tiny.fill(vae, seed=4)


def hunyuan_vae() -> diffusers.AutoencoderKLHunyuanVideo:
    """Return HunyuanVideo's autoencoder, of 4 channels."""
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    return tiny.fill(vae, seed=4)


def _with_image(pipe: Any, guided: bool) -> None:
    """Give the pipeline an image's embedding, which an encoder would make."""
    pipe.encode_image = lambda *_, **__: tiny.noise(1, 3, 16, seed=8)


def _switch_guider(pipe: Any, guided: bool) -> None:
    pipe.guider.enable() if guided else pipe.guider.disable()


RECIPES = {
    "Wan-VACE": Recipe(
        "WanVACEPipeline",
        "WanVACETransformer3DModel",
        call=FIVE,
        changes={"vace_in_channels": 72},
        parts={"vae": wan_vae},
        **NAMED,
    ),
    "ChronoEdit": Recipe(
        "ChronoEditPipeline",
        "ChronoEditTransformer3DModel",
        call=FIVE | {"image": PICTURE},
        prepare=_with_image,
        changes={"in_channels": 12, "image_dim": 16},
        parts={"vae": wan_vae},
    ),
    "AnyFlow": Recipe(
        "AnyFlowPipeline",
        "AnyFlowTransformer3DModel",
        call=FIVE,
        parts={"vae": wan_vae},
        **ONE,
    ),
    "Helios": Recipe(
        "HeliosPipeline",
        "HeliosTransformer3DModel",
        call=SMALL | {"num_frames": 17},
        parts={"vae": wan_vae},
        **NAMED,
    ),
    "Allegro": Recipe(
        "AllegroPipeline",
        "AllegroTransformer3DModel",
        call=TINY | {"num_frames": 8},
        scheduler=diffusers.DDIMScheduler,
        **MASK,
        **ONE,
    ),
    "EasyAnimate": Recipe(
        "EasyAnimatePipeline",
        "EasyAnimateTransformer3DModel",
        call=SMALL | {"num_frames": 5},
        parts={
            "vae": lambda: Part(
                {"latent_channels": 4}, spatial_compression_ratio=8, temporal_compression_ratio=4
            )
        },
        **MASK,
        **ONE,
    ),
    "Motif-Video": Recipe(
        "MotifVideoPipeline",
        "MotifVideoTransformer3DModel",
        call=FIVE,
        guided={},
        plain={},
        prepare=_switch_guider,
        branches=("pred_cond", "pred_uncond"),
        alone=("pred_cond",),
        changes={"in_channels": 9},
        parts={
            "guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=SCALE),
            "vae": lambda: Part(
                {"z_dim": 4, "scale_factor_spatial": 8, "scale_factor_temporal": 4}
            ),
        },
        **MASK,
    ),
    "Kandinsky 6": Recipe(
        "Kandinsky6TI2VAPipeline",
        "Kandinsky6Transformer3DModel",
        POOLED,
        call=SMALL | {"num_frames": 5, "sample_audio": False},
        **MASK,
        **NAMED,
    ),
}

PIECES = {
    "Helios": replace(RECIPES["Helios"], call=SMALL | {"num_frames": 66}),
    "Framepack": Recipe(
        "HunyuanVideoFramepackPipeline",
        "HunyuanVideoFramepackTransformer3DModel",
        POOLED,
        call=SMALL | {"num_frames": 37, "image": LARGE_PICTURE},
        prepare=_with_image,
        parts={"vae": hunyuan_vae},
        **MASK,
        **TRUE_CFG,
    ),
    "AnyFlow-FAR": Recipe(
        "AnyFlowFARPipeline",
        "AnyFlowFARTransformer3DModel",
        call=TINY | {"num_frames": 13, "chunk_partition": [1, 1, 2]},
        parts={"vae": wan_vae},
        **ONE,
    ),
}
"""Each makes its video in several pieces."""
