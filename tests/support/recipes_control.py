"""Tiny pipelines with a real ControlNet, in the notation of `recipes`."""

from typing import Any

import diffusers
import models
import tiny
from model_case import BLOCKS
from recipes import FLUX, NO_BINS, ONE, PICTURE, POOLED, TINY, TOKENS, TRUE_CFG, Recipe, vae

CONTROL = {"control_image": PICTURE, "controlnet_conditioning_scale": 0.7}


def filled(cls: str, **config: Any) -> Any:
    """Return a ControlNet whose last layers are not zero, as they are before any training."""
    return tiny.fill(getattr(diffusers, cls)(**config), seed=8)


def hunyuan() -> Any:
    config = models.CASES["HunyuanDiT2DModel"].config
    names = ("num_attention_heads", "attention_head_dim", "in_channels", "patch_size")
    names += ("hidden_size", "cross_attention_dim", "cross_attention_dim_t5")
    names += ("pooled_projection_dim", "text_len", "text_len_t5", "sample_size")
    own = {name: config[name] for name in names if name in config}
    return filled("HunyuanDiT2DControlNetModel", transformer_num_layers=BLOCKS, **own)


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def z_image() -> Any:
    config = models.CASES["ZImageTransformer2DModel"].config
    return filled(
        "ZImageControlNetModel",
        control_layers_places=[0, 3, 6],
        control_refiner_layers_places=[0],
        control_in_dim=4,
        add_control_noise_refiner="control_noise_refiner",
        dim=config["dim"],
        n_refiner_layers=1,
        n_heads=config["n_heads"],
        n_kv_heads=config["n_kv_heads"],
    )


RECIPES = {
    "FLUX.1 ControlNet": Recipe(
        "FluxControlNetPipeline",
        "FluxTransformer2DModel",
        POOLED,
        call=TINY | CONTROL,
        changes=FLUX | {"in_channels": 4},
        parts={
            "vae": vae,
            "controlnet": lambda: filled(
                "FluxControlNetModel",
                **{k: v for k, v in FLUX.items() if k != "out_channels"}
                | {"in_channels": 4, "num_single_layers": 2},
            ),
        },
        **TRUE_CFG,
    ),
    "Stable Diffusion 3 ControlNet": Recipe(
        "StableDiffusion3ControlNetPipeline",
        "SD3Transformer2DModel",
        POOLED,
        call=TINY | CONTROL,
        parts={
            "vae": lambda: vae(4),
            "controlnet": lambda: filled(
                "SD3ControlNetModel",
                **models.CASES["SD3Transformer2DModel"].config | {"num_layers": 3},
            ),
        },
        **ONE,
    ),
    "Qwen-Image ControlNet": Recipe(
        "QwenImageControlNetPipeline",
        "QwenImageTransformer2DModel",
        masks={"prompt_embeds_mask": TOKENS},
        call=TINY | CONTROL,
        parts={
            "vae": qwen_vae,
            "controlnet": lambda: filled(
                "QwenImageControlNetModel",
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=tiny.TEXT_DIM,
                axes_dims_rope=(4, 6, 6),
            ),
        },
        **TRUE_CFG,
        alone=("cond",),
    ),
    "Z-Image ControlNet": Recipe(
        "ZImageControlNetPipeline",
        "ZImageTransformer2DModel",
        call=TINY | CONTROL,
        plain={"guidance_scale": 0.0},
        parts={"vae": lambda: vae(4), "controlnet": z_image},
        as_lists=True,
        **ONE,
    ),
    "HunyuanDiT ControlNet": Recipe(
        "HunyuanDiTControlNetPipeline",
        "HunyuanDiT2DModel",
        {"prompt_embeds": (1, TOKENS, tiny.TEXT_DIM), "prompt_embeds_2": (1, 4, 16)},
        {"prompt_attention_mask": TOKENS, "prompt_attention_mask_2": 4},
        call=NO_BINS | CONTROL,
        parts={"vae": lambda: vae(4, levels=4), "controlnet": hunyuan},
        scheduler=diffusers.DDPMScheduler,
        **ONE,
    ),
}
