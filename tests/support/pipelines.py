"""Complete tiny pipelines of diffusers: what each is made of and how it is called, as data.

Text encoders are left out where a pipeline takes ready embeddings, and the VAE where it can do
without; the transformers are those of `models.CASES`. What comes out are latents.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import models
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from model_case import TEXT, find_class

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
    "FLUX.2 Klein": Recipe(
        "Flux2KleinPipeline", "Flux2Transformer2DModel", call={"height": 64, "width": 64}, **NAMED,
    ),
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
    options = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
        "return_dict": False,
    }
    options |= recipe.call | (recipe.guided if guided else recipe.plain) | tensors | more
    return pipe(**options)[0]
