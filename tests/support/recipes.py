"""What tiny pipelines of diffusers are made of and how they are called, as data.

Text encoders are left out where a pipeline takes ready embeddings, and the VAE where it can do
without; the transformers are those of `models.CASES`. What comes out are latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from model_case import BLOCKS, TEXT

SCALE = tiny.CFG_SCALE
TOKENS = tiny.TEXT_TOKENS


@dataclass(frozen=True)
class Recipe:
    """One pipeline.

    Attributes:
        pipeline: class name in diffusers.
        transformer: class name of its transformer, a key of `models.CASES`.
        text: shapes of the embeddings that it takes; with guidance also of those that are called
            the same with "negative_" before.
        masks: number of tokens of the masks of the text, which go by names in the same way.
        call: what else it is called with.
        guided, plain: what is added with guidance on and with guidance off.
        branches: lanes with guidance on, in the order of their calls.
        alone: lanes with guidance off.
        changes: what its transformer's config has different from the case's.
        parts: builds its other components; those not named are None.
        scheduler: builds the scheduler.
        steps: of each transformer, where they share the pipeline's.
        as_lists: text is given as a list, one entry per sample.
        prepare: takes (pipeline, whether guided) before a call.
    """

    pipeline: str
    transformer: str
    text: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"prompt_embeds": TEXT})
    masks: dict[str, int] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=lambda: dict(SMALL))
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": SCALE})
    plain: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    branches: tuple[str | None, ...] = ("cond", "uncond")
    alone: tuple[str | None, ...] = (None,)
    changes: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Callable[[], Any]] = field(default_factory=dict)
    scheduler: Callable[[], Any] = Euler
    steps: int = 6
    as_lists: bool = False
    prepare: Callable[[Any, bool], Any] | None = None


class Part(torch.nn.Module):
    """In place of a component of which only some attributes are read."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, config: dict[str, Any] | None = None, **attributes: Any):
        super().__init__()
        self.config = SimpleNamespace(**(config or {}))
        self.__dict__.update(attributes)


def vae(channels: int = 1, levels: int = 2) -> diffusers.AutoencoderKL:
    """Return an autoencoder of pictures, at half the size for each level but the first."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    ).eval()


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    """Return FLUX.2's autoencoder, at half the size."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def connectors() -> torch.nn.Module:
    """Return what stands between LTX-2's text encoder and its transformer."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors  # newer than others

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
    registers = {"num_learnable_registers": None}
    return tiny.fill(
        LTX2TextConnectors(
            caption_channels=tiny.TEXT_DIM,
            text_proj_in_factor=1,
            **{f"{x}_connector_{k}": v for x in ("video", "audio") for k, v in sizes.items()},
            **{f"{x}_connector_{k}": v for x in ("video", "audio") for k, v in registers.items()},
        ),
        seed=9,
    )


def unipc() -> diffusers.UniPCMultistepScheduler:
    """Return the scheduler of SkyReels-V2."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )


def _prepare_hunyuan_video(pipe: Any, guided: bool) -> None:
    """Switch the guider of HunyuanVideo 1.5, and make do with few tokens for an absent image."""
    pipe.vision_num_semantic_tokens = 3
    pipe.guider.enable() if guided else pipe.guider.disable()


SMALL = {"height": 64, "width": 64}
TINY = {"height": 32, "width": 32}
ONE = {"branches": (None,)}
"""Guidance is in the batch."""

NAMED = {"alone": ("cond",)}
NAMED_BATCH = {"branches": ("cond_uncond",), "alone": ("cond_uncond",)}
TRUE_CFG = {"guided": {"true_cfg_scale": SCALE}, "plain": {"true_cfg_scale": 1.0}}
POOLED = {"prompt_embeds": TEXT, "pooled_prompt_embeds": (1, 12)}
MASK = {"masks": {"prompt_attention_mask": TOKENS}}
NO_BINS = SMALL | {"use_resolution_binning": False}
FLUX = {
    "patch_size": 1,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": tiny.TEXT_DIM,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}
PICTURE = tiny.noise(1, 3, 32, 32, seed=2).sigmoid()
LENGTHS = torch.tensor([0, TOKENS])

RECIPES = {
    "FLUX.1": Recipe("FluxPipeline", "FluxTransformer2DModel", POOLED, **TRUE_CFG, **NAMED),
    "FLUX.1 Kontext": Recipe(
        "FluxKontextPipeline",
        "FluxTransformer2DModel",
        POOLED,
        call=SMALL | {"max_area": 64 * 64},
        **TRUE_CFG,
    ),
    "FLUX.1 Control": Recipe(
        "FluxControlPipeline",
        "FluxTransformer2DModel",
        POOLED,
        call=TINY | {"control_image": PICTURE},
        changes=FLUX | {"in_channels": 8},
        parts={"vae": vae},
        **ONE,
    ),
    "FLUX.1 image to image": Recipe(
        "FluxImg2ImgPipeline",
        "FluxTransformer2DModel",
        POOLED,
        call=TINY | {"image": PICTURE, "strength": 1.0},
        changes=FLUX | {"in_channels": 4},
        parts={"vae": vae},
        **TRUE_CFG,
    ),
    "FLUX.2": Recipe("Flux2Pipeline", "Flux2Transformer2DModel", **ONE),
    "FLUX.2 Klein": Recipe(
        "Flux2KleinPipeline", "Flux2Transformer2DModel", parts={"vae": flux2_vae}, **NAMED
    ),
    "Stable Diffusion 3": Recipe(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", POOLED, **ONE
    ),
    "Qwen-Image": Recipe(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        masks={"prompt_embeds_mask": TOKENS},
        **TRUE_CFG,
        **NAMED,
    ),
    "Lumina-Next": Recipe("LuminaPipeline", "LuminaNextDiT2DModel", **MASK, **ONE),
    "Lumina 2": Recipe("Lumina2Pipeline", "Lumina2Transformer2DModel", **MASK),
    "AuraFlow": Recipe("AuraFlowPipeline", "AuraFlowTransformer2DModel", **MASK, **ONE),
    "Chroma": Recipe("ChromaPipeline", "ChromaTransformer2DModel", **MASK),
    "CogView3-Plus": Recipe(
        "CogView3PlusPipeline",
        "CogView3PlusTransformer2DModel",
        scheduler=diffusers.CogVideoXDDIMScheduler,
        **ONE,
    ),
    "CogView4": Recipe("CogView4Pipeline", "CogView4Transformer2DModel", **NAMED),
    "Sana": Recipe("SanaPipeline", "SanaTransformer2DModel", call=NO_BINS, **MASK, **ONE),
    "PixArt-sigma": Recipe(
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        call=NO_BINS,
        scheduler=diffusers.DDIMScheduler,
        **MASK,
        **ONE,
    ),
    "Ovis-Image": Recipe("OvisImagePipeline", "OvisImageTransformer2DModel", **NAMED),
    "ERNIE-Image": Recipe("ErnieImagePipeline", "ErnieImageTransformer2DModel", **ONE),
    "HiDream-I1": Recipe(
        "HiDreamImagePipeline",
        "HiDreamImageTransformer2DModel",
        {
            "prompt_embeds_t5": TEXT,
            "prompt_embeds_llama3": (BLOCKS, 1, 5, 20),
            "pooled_prompt_embeds": (1, 12),
        },
        prepare=lambda pipe, _: setattr(pipe, "default_sample_size", 8),  # it fills that area
        **ONE,
    ),
    "HunyuanDiT": Recipe(
        "HunyuanDiTPipeline",
        "HunyuanDiT2DModel",
        {"prompt_embeds": TEXT, "prompt_embeds_2": (1, 4, 16)},
        {"prompt_attention_mask": TOKENS, "prompt_attention_mask_2": 4},
        call=NO_BINS,
        scheduler=diffusers.DDPMScheduler,
        **ONE,
    ),
    "Z-Image": Recipe(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        call=SMALL,
        plain={"guidance_scale": 0.0},
        as_lists=True,
        **ONE,
    ),
    "Krea 2": Recipe(
        "Krea2Pipeline",
        "Krea2Transformer2DModel",
        {"prompt_embeds": (1, TOKENS, 3, tiny.TEXT_DIM)},
        {"prompt_embeds_mask": TOKENS},
        plain={"guidance_scale": 0.0},
    ),
    "PRX": Recipe("PRXPipeline", "PRXTransformer2DModel", call=NO_BINS, **MASK, **ONE),
    "DiT": Recipe(
        "DiTPipeline",
        "DiTTransformer2DModel",
        {},
        call={"class_labels": [1]},
        parts={"vae": lambda: vae(4)},
        scheduler=diffusers.DDIMScheduler,
        **ONE,
    ),
    "Wan 2.1": Recipe(
        "WanPipeline", "WanTransformer3DModel", call=TINY | {"num_frames": 5}, **NAMED
    ),
    "Wan 2.2": Recipe(
        "WanPipeline",
        "WanTransformer3DModel",
        call=TINY | {"num_frames": 5},
        parts={
            "transformer_2": lambda: tiny.wan(seed=3, layers=BLOCKS),
            "boundary_ratio": lambda: 0.5,
        },
        steps=3,
        **NAMED,
    ),
    "Wan 2.1 video to video": Recipe(
        "WanVideoToVideoPipeline",
        "WanTransformer3DModel",
        call=TINY | {"latents": tiny.noise(1, 4, 2, 4, 4, seed=5), "strength": 1.0},
    ),
    "SkyReels-V2": Recipe(
        "SkyReelsV2Pipeline",
        "SkyReelsV2Transformer3DModel",
        call=TINY | {"num_frames": 5},
        scheduler=unipc,
        **NAMED,
    ),
    "SkyReels-V2 diffusion forcing": Recipe(
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2Transformer3DModel",
        call=TINY | {"num_frames": 5, "base_num_frames": 5, "prompt": None},
        scheduler=unipc,
        **NAMED,
    ),
    "HunyuanVideo": Recipe(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {"prompt_embeds": TEXT, "pooled_prompt_embeds": (1, 8)},
        call=TINY | {"num_frames": 5},
        **MASK,
        **TRUE_CFG,
        **NAMED,
    ),
    "HunyuanVideo 1.5": Recipe(
        "HunyuanVideo15Pipeline",
        "HunyuanVideo15Transformer3DModel",
        {"prompt_embeds": TEXT, "prompt_embeds_2": (1, 4, 8)},
        {"prompt_embeds_mask": TOKENS, "prompt_embeds_mask_2": 4},
        call=SMALL | {"num_frames": 5},
        guided={},
        plain={},
        prepare=_prepare_hunyuan_video,
        branches=("pred_cond", "pred_uncond"),
        alone=("pred_cond",),
        changes={"in_channels": 9},
        parts={
            "guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=SCALE),
            "vae": lambda: Part(
                {"latent_channels": 4}, temporal_compression_ratio=4, spatial_compression_ratio=16
            ),
        },
    ),
    "CogVideoX": Recipe(
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        call=SMALL | {"num_frames": 5},
        scheduler=diffusers.CogVideoXDPMScheduler,
        **NAMED_BATCH,
    ),
    "Mochi": Recipe(
        "MochiPipeline",
        "MochiTransformer3DModel",
        call=TINY | {"num_frames": 7},
        **MASK,
        **NAMED_BATCH,
    ),
    "LTX-Video": Recipe(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        call=SMALL | {"num_frames": 9},
        **MASK,
        **NAMED_BATCH,
    ),
    "LTX-2": Recipe(
        "LTX2Pipeline",
        "LTX2VideoTransformer3DModel",
        call=SMALL | {"num_frames": 9, "spatio_temporal_guidance_blocks": [3]},
        guided={"guidance_scale": SCALE},
        plain={"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}
        | {"audio_guidance_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0},
        branches=("cond_uncond", "uncond_stg", "uncond_modality"),
        alone=("cond_uncond",),
        parts={
            "connectors": connectors,
            "vae": lambda: Part(
                {"scaling_factor": 1.0},
                spatial_compression_ratio=32,
                temporal_compression_ratio=8,
                latents_mean=torch.zeros(4),
                latents_std=torch.ones(4),
            ),
            "audio_vae": lambda: Part(
                {"sample_rate": 16000, "mel_hop_length": 160, "mel_bins": 12, "latent_channels": 1},
                mel_compression_ratio=4,
                temporal_compression_ratio=4,
                latents_mean=torch.zeros(3),
                latents_std=torch.ones(3),
            ),
        },
        **MASK,
    ),
    "Sana-Video": Recipe(
        "SanaVideoPipeline",
        "SanaVideoTransformer3DModel",
        call=NO_BINS | {"frames": 5},
        **MASK,
        **ONE,
    ),
    "Latte": Recipe(
        "LattePipeline",
        "LatteTransformer3DModel",
        call=TINY | {"video_length": 3, "mask_feature": False},
        changes={"out_channels": 8},
        scheduler=diffusers.DDIMScheduler,
        **ONE,
    ),
    "Cosmos 2": Recipe(
        "Cosmos2TextToImagePipeline",
        "CosmosTransformer3DModel",
        call=TINY,
        parts={
            "safety_checker": lambda: Part(
                check_text_safety=lambda _: True, check_video_safety=lambda video: video
            )
        },
        scheduler=lambda: Euler(use_karras_sigmas=True),
    ),
    "Kandinsky 5": Recipe(
        "Kandinsky5T2VPipeline",
        "Kandinsky5Transformer3DModel",
        {"prompt_embeds_qwen": TEXT, "prompt_embeds_clip": (1, 8)},
        call=SMALL | {"num_frames": 5, "prompt_cu_seqlens": LENGTHS},
        guided={"guidance_scale": SCALE, "negative_prompt_cu_seqlens": LENGTHS},
    ),
    "Stable Audio": Recipe(
        "StableAudioPipeline",
        "StableAudioDiTModel",
        call={"audio_end_in_s": 3.0},
        changes={"cross_attention_input_dim": 12, "global_states_input_dim": 24},
        parts={
            "vae": lambda: diffusers.AutoencoderOobleck(
                encoder_hidden_size=6,
                downsampling_ratios=[1, 2],
                decoder_channels=3,
                decoder_input_channels=16,
                audio_channels=2,
                channel_multiples=[2, 4],
                sampling_rate=4,
            ),
            "projection_model": lambda: diffusers.StableAudioProjectionModel(
                text_encoder_dim=tiny.TEXT_DIM, conditioning_dim=12, min_value=0, max_value=32
            ),
        },
        scheduler=diffusers.EDMDPMSolverMultistepScheduler,
        **ONE,
    ),
}
"""By what users call it."""
