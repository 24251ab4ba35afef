"""Complete tiny pipelines of diffusers: what each is made of and how it is called, as data.

Text encoders are left out where a pipeline takes ready embeddings, and the VAE where it can do
without; the transformers are those of `models.CASES`. What comes out are latents.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import models
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from model_case import TEXT, find_class
from models_image import FLUX_LIKE

STEPS = 6
MASK = TEXT[:2]


@dataclass(frozen=True)
class Recipe:
    """One pipeline.

    Attributes:
        pipeline: class name in diffusers.
        transformer: class name of its transformer, a key of `models.CASES`.
        text: shapes of the embeddings that it takes; with guidance also of those that are called
            the same with "negative_" before.
        masks: names of the masks of the text, in the same way.
        call: what else it is called with.
        guided, plain: what is added with guidance on and with guidance off.
        branches: lanes with guidance on, in the order of their calls.
        alone: lanes with guidance off.
        changes: what its transformer's config has different from the case's.
        parts: builds its other components; those not named are None.
        scheduler: builds the scheduler.
    """

    pipeline: str
    transformer: str
    text: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"prompt_embeds": TEXT})
    masks: tuple[str, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": tiny.CFG_SCALE})
    plain: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    branches: tuple[str | None, ...] = ("cond", "uncond")
    alone: tuple[str | None, ...] = (None,)
    changes: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Callable[[], Any]] = field(default_factory=dict)
    scheduler: Callable[[], Any] = FlowMatchEulerDiscreteScheduler



class Stand(torch.nn.Module):
    """In place of a VAE of which only the config is read."""

    device = torch.device("cpu")
    dtype = torch.float32
    temporal_compression_ratio, spatial_compression_ratio = 4, 16

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)


class Unsafe(torch.nn.Module):
    device = torch.device("cpu")
    dtype = torch.float32
    def check_text_safety(self, *_): return True
    def check_video_safety(self, x): return x

def vae():
    """Return an autoencoder of pictures, 1 channel at half the size."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
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
    ).eval()

FLUX = FLUX_LIKE | {"pooled_projection_dim": 12}
IMAGE = {"height": 32, "width": 32}
ONE = {"branches": (None,), "alone": (None,)}
NAMED = {"alone": ("cond",)}
BATCHED = {"branches": ("cond_uncond",), "alone": ("cond_uncond",)}
POOLED = {"prompt_embeds": TEXT, "pooled_prompt_embeds": (1, 12)}
TRUE_CFG = {
    "guided": {"true_cfg_scale": tiny.CFG_SCALE},
    "plain": {"true_cfg_scale": 1.0},
}

RECIPES = {
    "FLUX.1": Recipe(
        "FluxPipeline", "FluxTransformer2DModel", POOLED, call={"height": 64, "width": 64},
        **TRUE_CFG, **NAMED,
    ),
    "FLUX.1 Kontext": Recipe(
        "FluxKontextPipeline", "FluxTransformer2DModel", POOLED,
        call={"height": 64, "width": 64, "max_area": 64 * 64}, **TRUE_CFG,
    ),
    "Qwen-Image": Recipe(
        "QwenImagePipeline", "QwenImageTransformer2DModel", masks=("prompt_embeds_mask",),
        call={"height": 64, "width": 64}, **TRUE_CFG, **NAMED,
    ),
    "FLUX.2 Klein": Recipe("Flux2KleinPipeline", "Flux2Transformer2DModel", call={"height": 64, "width": 64}, **NAMED, parts={"vae": lambda: diffusers.AutoencoderKLFlux2(block_out_channels=(4,4), down_block_types=("DownEncoderBlock2D",)*2, up_block_types=("UpDecoderBlock2D",)*2, layers_per_block=1, latent_channels=4, norm_num_groups=1).eval()}),
    "FLUX.2": Recipe("Flux2Pipeline", "Flux2Transformer2DModel",call={"height": 64, "width": 64}, **ONE, changes={"guidance_embeds": True}),
    "SD3": Recipe("StableDiffusion3Pipeline", "SD3Transformer2DModel", POOLED, call={"height": 64, "width": 64}, **ONE),
    "Lumina2": Recipe("Lumina2Pipeline", "Lumina2Transformer2DModel", masks=("prompt_attention_mask",), call={"height": 64, "width": 64}),
    "AuraFlow": Recipe("AuraFlowPipeline", "AuraFlowTransformer2DModel", masks=("prompt_attention_mask",), call={"height": 64, "width": 64}, **ONE),
    "Chroma": Recipe("ChromaPipeline", "ChromaTransformer2DModel", masks=("prompt_attention_mask",), call={"height": 64, "width": 64}),
    "CogView4": Recipe("CogView4Pipeline", "CogView4Transformer2DModel", call={"height": 64, "width": 64}, **NAMED),
    "CogView3+": Recipe("CogView3PlusPipeline", "CogView3PlusTransformer2DModel", call={"height": 64, "width": 64}, **ONE, scheduler=diffusers.CogVideoXDDIMScheduler),
    "Sana": Recipe("SanaPipeline", "SanaTransformer2DModel", masks=("prompt_attention_mask",), call={"height": 64, "width": 64, "use_resolution_binning": False}, **ONE),
    "PixArt": Recipe("PixArtSigmaPipeline", "PixArtTransformer2DModel", masks=("prompt_attention_mask",), call={"height": 64, "width": 64, "use_resolution_binning": False}, **ONE, scheduler=diffusers.DDIMScheduler),
    "LTX": Recipe("LTXPipeline", "LTXVideoTransformer3DModel", masks=("prompt_attention_mask",), call={"height": 64, "width": 64, "num_frames": 9}, **BATCHED),
    "Mochi": Recipe("MochiPipeline", "MochiTransformer3DModel", masks=("prompt_attention_mask",), call={"height": 32, "width": 32, "num_frames": 7}, **BATCHED),
    "HunyuanVideo": Recipe("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", {"prompt_embeds": TEXT, "pooled_prompt_embeds": (1, 8)}, ("prompt_attention_mask",), call={"height": 32, "width": 32, "num_frames": 5}, **TRUE_CFG, **NAMED),
    "CogVideoX": Recipe("CogVideoXPipeline", "CogVideoXTransformer3DModel", call={"height": 64, "width": 64, "num_frames": 5}, **BATCHED, scheduler=diffusers.CogVideoXDPMScheduler),
    "Wan": Recipe("WanPipeline", "WanTransformer3DModel", call={"height": 32, "width": 32, "num_frames": 5}, **NAMED),
    "Bria": Recipe("BriaPipeline", "BriaTransformer2DModel", call={"height": 64, "width": 64}, **ONE),
    "Ovis": Recipe("OvisImagePipeline", "OvisImageTransformer2DModel", call={"height": 64, "width": 64}, **NAMED),
    "LongCat": Recipe("LongCatImagePipeline", "LongCatImageTransformer2DModel", call={"height": 64, "width": 64}, **NAMED),
    "Lumina": Recipe("LuminaPipeline", "LuminaNextDiT2DModel", masks=("prompt_attention_mask",), call={"height": 64, "width": 64}, **ONE),
    "CogView4 Control": Recipe("CogView4ControlPipeline", "CogView4Transformer2DModel", call={"height": 64, "width": 64}),
    "FLUX.1 Control": Recipe("FluxControlPipeline", "FluxTransformer2DModel", POOLED, call={"height": 32, "width": 32, "control_image": torch.rand(1, 3, 32, 32)}, **ONE, changes=FLUX | {"in_channels": 8, "out_channels": 4}, parts={"vae": vae}),
    "FLUX.1 img2img": Recipe("FluxImg2ImgPipeline", "FluxTransformer2DModel", POOLED, call={"height": 32, "width": 32, "image": torch.rand(1, 3, 32, 32), "strength": 1.0}, **TRUE_CFG, changes=FLUX | {"in_channels": 4, "out_channels": 4}, parts={"vae": vae}),
    "Wan 2.2": Recipe("WanPipeline", "WanTransformer3DModel", call={"height": 32, "width": 32, "num_frames": 5}, **NAMED, parts={"transformer_2": lambda: tiny.wan(seed=3), "boundary_ratio": lambda: 0.5}),
    "Wan V2V": Recipe("WanVideoToVideoPipeline", "WanTransformer3DModel", call={"height": 32, "width": 32, "latents": tiny.noise(1, 4, 2, 4, 4, seed=5), "strength": 1.0}),
    "ChronoEdit": Recipe("ChronoEditPipeline", "ChronoEditTransformer3DModel", call={"height": 32, "width": 32, "num_frames": 5}),
    "SkyReels": Recipe("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", call={"height": 32, "width": 32, "num_frames": 5}, **NAMED, scheduler=lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
    "SkyReels DF": Recipe("SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2Transformer3DModel", call={"prompt": None, "height": 32, "width": 32, "num_frames": 5, "base_num_frames": 5}, **NAMED, scheduler=lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
    "Cosmos 2": Recipe("Cosmos2TextToImagePipeline", "CosmosTransformer3DModel", call={"height": 32, "width": 32}, parts={"safety_checker": Unsafe}, scheduler=lambda: FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)),
    "StableAudio": Recipe("StableAudioPipeline", "StableAudioDiTModel", **ONE),
    "DiT": Recipe("DiTPipeline", "DiTTransformer2DModel", {}, call={"class_labels": [1]}, **ONE, scheduler=diffusers.DDIMScheduler),
    "Z-Image": Recipe("ZImagePipeline", "ZImageTransformer2DModel", call={"height": 64, "width": 64}, **ONE, plain={"guidance_scale": 0.0}),
    "HiDream": Recipe("HiDreamImagePipeline", "HiDreamImageTransformer2DModel", {"prompt_embeds_t5": TEXT, "prompt_embeds_llama3": (2, 1, 1, 6, 24), "pooled_prompt_embeds": (1, 12)}, call={"height": 64, "width": 64}, **ONE),
    "HunyuanDiT": Recipe("HunyuanDiTPipeline", "HunyuanDiT2DModel", {"prompt_embeds": TEXT, "prompt_embeds_2": TEXT}, masks=("prompt_attention_mask", "prompt_attention_mask_2"), call={"height": 64, "width": 64, "use_resolution_binning": False}, **ONE, scheduler=diffusers.DDPMScheduler),
    "Latte": Recipe("LattePipeline", "LatteTransformer3DModel", call={"height": 32, "width": 32, "video_length": 3, "mask_feature": False}, **ONE, scheduler=diffusers.DDIMScheduler, changes={"out_channels": 8}),
    "Allegro": Recipe("AllegroPipeline", "AllegroTransformer3DModel", masks=("prompt_attention_mask",), call={"height": 32, "width": 32, "num_frames": 8}, **ONE),
    "Kandinsky 5": Recipe("Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", {"prompt_embeds_qwen": TEXT, "prompt_embeds_clip": (1, 8)}, call={"height": 64, "width": 64, "num_frames": 5, "prompt_cu_seqlens": torch.tensor([0, 6])}, guided={"guidance_scale": 2.5, "negative_prompt_cu_seqlens": torch.tensor([0, 6])}),
    "HunyuanVideo 1.5": Recipe("HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel", {"prompt_embeds": TEXT, "prompt_embeds_2": (1, 4, 8)}, masks=("prompt_embeds_mask", "prompt_embeds_mask_2"), call={"height": 64, "width": 64, "num_frames": 5}, guided={}, plain={}, branches=("pred_cond", "pred_uncond"), alone=("pred_cond",), parts={"guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=2.5), "vae": lambda: Stand(latent_channels=1)}),
    "Framepack": Recipe("HunyuanVideoFramepackPipeline", "HunyuanVideoFramepackTransformer3DModel", {"prompt_embeds": TEXT, "pooled_prompt_embeds": (1, 8)}, masks=("prompt_attention_mask",), call={"height": 64, "width": 64, "num_frames": 9, "image": torch.rand(1, 3, 64, 64)}, **TRUE_CFG),
    "EasyAnimate": Recipe("EasyAnimatePipeline", "EasyAnimateTransformer3DModel", masks=("prompt_attention_mask",), call={"height": 64, "width": 64, "num_frames": 5}, **ONE),
    "SanaVideo": Recipe("SanaVideoPipeline", "SanaVideoTransformer3DModel", masks=("prompt_attention_mask",), call={"height": 64, "width": 64, "frames": 5, "use_resolution_binning": False}, **ONE),
    "LTX-2": Recipe("LTX2Pipeline", "LTX2VideoTransformer3DModel", {"prompt_embeds": (1, 6, 12)}, masks=("prompt_attention_mask",), call={"height": 64, "width": 64, "num_frames": 9, "spatio_temporal_guidance_blocks": [3]}, guided={"guidance_scale": 2.5}, plain={"guidance_scale": 1.0, "audio_guidance_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}, branches=("cond_uncond", "uncond_stg", "uncond_modality"), alone=("cond_uncond",), changes={"audio_in_channels": 128, "audio_out_channels": 128}, parts={"connectors": lambda: tiny.fill(diffusers.pipelines.ltx2.connectors.LTX2TextConnectors(caption_channels=12, text_proj_in_factor=1, video_connector_num_attention_heads=2, video_connector_attention_head_dim=6, audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=6, video_connector_num_layers=1, audio_connector_num_layers=1, video_connector_num_learnable_registers=None, audio_connector_num_learnable_registers=None), seed=9)}),
    "Krea2": Recipe("Krea2Pipeline", "Krea2Transformer2DModel", masks=("prompt_embeds_mask",), call={"height": 64, "width": 64}),
    "ErnieImage": Recipe("ErnieImagePipeline", "ErnieImageTransformer2DModel", call={"height": 64, "width": 64}, **ONE),
    "PRX": Recipe("PRXPipeline", "PRXTransformer2DModel", masks=("prompt_attention_mask",), call={"height": 64, "width": 64}, **ONE),
}
"""By what users call it."""


def build(name: str) -> Any:
    """Return a tiny pipeline."""
    recipe = RECIPES[name]
    cls = getattr(diffusers, recipe.pipeline)
    case = models.CASES[recipe.transformer]
    if case.build is not None and not recipe.changes:
        transformer = case.build()
    else:
        config = case.config | recipe.changes
        transformer = tiny.fill(find_class(recipe.transformer)(**config), seed=3)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    parts = {p.name: None for p in parameters if p.default is inspect.Parameter.empty}
    parts |= {"transformer": transformer, "scheduler": recipe.scheduler()}
    parts |= {part: make() for part, make in recipe.parts.items()}
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe: Any, name: str, *, guided: bool, steps: int = STEPS, **more: Any) -> torch.Tensor:
    """Call a tiny pipeline; return the latents."""
    recipe = RECIPES[name]
    tensors = {}
    for sign in ("", "negative_")[: 1 + guided]:
        for i, (key, shape) in enumerate(recipe.text.items(), 11 + 100 * bool(sign)):
            tensors[sign + key] = tiny.noise(*shape, seed=i)
        for key in recipe.masks:
            tensors[sign + key] = torch.ones(MASK, dtype=torch.bool)
    accepted = inspect.signature(pipe.__call__).parameters
    tensors = {key: value for key, value in tensors.items() if key in accepted}
    if tensors and "negative_prompt" in accepted and accepted["negative_prompt"].default == "":
        tensors["negative_prompt"] = None
    options = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
        "return_dict": False,
    }
    options |= recipe.call | (recipe.guided if guided else recipe.plain) | tensors | more
    return pipe(**options)[0]
