"""Settings that others publish, per family of models and level: `preset`, `presets`.

    dbcache.enable(pipe, **dbcache.preset("flux", "balanced"))
    dbcache.enable(pipe, **dbcache.preset(pipe, "fast", num_inference_steps=8))

Each row names its source, and the figures are those of the source, on its hardware and with its
code. Nothing here was measured by this project: `dbcache.tune` finds a schedule for one's own
model, and says what it costs there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dbcache.config.cache import DBCacheConfig, ParamsModifier
from dbcache.config.files import load_configs
from dbcache.config.options import check_choice, check_int, shown

LEVELS = ("high", "balanced", "fast")
"""Of quality, from close to the uncached picture to fast."""

FEW_STEPS = 12
"""Requests of at most so many steps take the rows for few steps, whatever the family."""


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        family: name that `preset` takes.
        level: "high", "balanced" or "fast".
        options: flat options, as `load_configs` takes them.
        published: what the source says of speed and quality.
        source: where the settings and the figures are from.
        steps: fewest and most steps of a request that the row is for; None: any.
        modifiers: options of each transformer, where a pipeline has two.
    """

    family: str
    level: str
    options: Mapping[str, Any]
    published: str
    source: str
    steps: tuple[int, int] | None = None
    modifiers: tuple[Mapping[str, Any], ...] = field(default=())

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `enable`."""
        found = load_configs(self.options)
        if self.modifiers:
            found["params_modifiers"] = [
                ParamsModifier(cache_config=DBCacheConfig(**each)) for each in self.modifiers
            ]
        return found


_BENCH = "cache-dit, docs/benchmark/HYBRID_CACHE.md and bench/cache (DrawBench, L20)"
_LIGHTNING = "cache-dit, docs/benchmark/HYBRID_CACHE.md: Qwen-Image-Lightning, 4 steps"
_TURBO = "cache-dit, examples/README.md and docs/EXAMPLES.md: Z-Image-Turbo, 9 steps"
_VLLM = "vLLM-Omni, docs/user_guide/diffusion/cache_acceleration/cache_dit: default"
_SGLANG = "SGLang, docs/diffusion/performance/cache/cache_dit: config.yaml"
_XDIT = "xDiT, xfuser/model_executor: DBCachePreset"
_TEA = "TeaCache, comments of teacache_sample_*.py (github.com/ali-vilab/TeaCache)"
_EASY = "EasyCache, README and easycache_*.py (github.com/H-EmbodVis/EasyCache)"
_NO_FIGURE = "no figure"

_TAYLOR = {
    "enable_taylorseer": True,
    "enable_encoder_taylorseer": True,
    "taylorseer_order": 1,
}
_F8 = {"Fn_compute_blocks": 8, "max_warmup_steps": 8, "residual_diff_threshold": 0.08, **_TAYLOR}
_F1 = {"Fn_compute_blocks": 1, "max_warmup_steps": 4}
_SERVED = {**_F1, "max_continuous_cached_steps": 3, "residual_diff_threshold": 0.24}
_MANY = {**_F1, "max_continuous_cached_steps": 6, "residual_diff_threshold": 0.24}
_INTERVALS = {
    "Fn_compute_blocks": 1, "max_warmup_steps": 8, "warmup_interval": 2,
    "max_continuous_cached_steps": 2, "residual_diff_threshold": 0.12, **_TAYLOR,
}  # fmt: skip
_LIGHT = {"max_warmup_steps": 2, "max_continuous_cached_steps": 1, "residual_diff_threshold": 0.8}
_TURBO_MASKED = {**_SERVED, "residual_diff_threshold": 0.6}
_DISTILLED = "F{0}B{0}: {1} in FLOPs, {2} dB"


def _tea(threshold: float) -> dict[str, Any]:
    """Return TeaCache's settings: the first and nothing else is full beforehand."""
    return {"policy": "teacache", "residual_diff_threshold": threshold, "max_warmup_steps": 1}


def _easy(threshold: float, warmup: int) -> dict[str, Any]:
    return {
        "policy": "easycache", "residual_diff_threshold": threshold, "max_warmup_steps": warmup,
    }  # fmt: skip


# fmt: off
PRESETS = (
    Preset("flux", "high", _F8, "1.53x, 36.7 dB, SSIM 0.934 (FLUX.1-dev, 50 steps)", _BENCH),
    Preset("flux", "balanced", {**_F1, "residual_diff_threshold": 0.08, **_TAYLOR},
           "1.84x, 34.5 dB, SSIM 0.885 (FLUX.1-dev, 50 steps)", _BENCH),
    Preset("flux", "fast", _MANY, "2.75x, 31.1 dB, SSIM 0.762 (FLUX.1-dev, 50 steps)", _BENCH),
    Preset("qwen-image", "high", _INTERVALS, "up to 1.69x", _SGLANG),
    Preset("qwen-image", "balanced", _SERVED, "1.5x to 2x", _VLLM),
    Preset("qwen-image", "fast", _MANY, "2.75x, 31.1 dB on FLUX.1-dev; " + _NO_FIGURE + " here",
           _BENCH),
    Preset("sd3", "high", {**_F8, "Fn_compute_blocks": 2, "steps_computation_mask": "fast",
                           "enable_encoder_taylorseer": False}, _NO_FIGURE, _XDIT),
    Preset("sd3", "balanced", _SERVED, "1.5x to 2x", _VLLM),
    Preset("sd3", "fast", _MANY, "2.75x, 31.1 dB on FLUX.1-dev; " + _NO_FIGURE + " here", _BENCH),
    Preset("wan", "high", _F8, _NO_FIGURE, _XDIT + ", without its mask"),
    Preset("wan", "balanced", _SERVED, "1.5x to 2x", _VLLM),
    Preset("wan", "fast", _easy(0.05, 10), "2.54x, 25.2 dB (Wan2.1-1.3B, 50 steps)", _EASY),
    Preset("wan2.2", "high", {**_F8, "Fn_compute_blocks": 4}, _NO_FIGURE,
           _XDIT + ", without its mask",
           modifiers=({"max_warmup_steps": 4}, {"max_warmup_steps": 2})),
    Preset("wan2.2", "balanced", _SERVED, "1.5x to 2x", _VLLM + "; limits: cache-dit, examples/api/"
           "run_cache_refresh_wan_2.2.py",
           modifiers=({"max_warmup_steps": 4, "max_cached_steps": 8},
                      {"max_warmup_steps": 2, "max_cached_steps": 20})),
    Preset("wan2.2", "fast", _MANY, _NO_FIGURE, _BENCH,
           modifiers=({"max_warmup_steps": 4}, {"max_warmup_steps": 2})),
    Preset("hunyuan-video", "high", _F8, _NO_FIGURE, _XDIT + ", without its mask"),
    Preset("hunyuan-video", "balanced", _easy(0.025, 5),
           "2.21x, 32.7 dB, SSIM 0.931 (50 steps, A800)", _EASY),
    Preset("hunyuan-video", "fast", _MANY, "2.75x on FLUX.1-dev; " + _NO_FIGURE + " here", _BENCH),
    Preset("mochi", "high", _tea(0.06), "1.5x", _TEA),
    Preset("mochi", "balanced", _tea(0.09), "2.1x", _TEA),
    Preset("mochi", "fast", _MANY, "2.75x on FLUX.1-dev; " + _NO_FIGURE + " here", _BENCH),
    Preset("image", "high", _INTERVALS, "up to 1.69x (Qwen-Image)", _SGLANG),
    Preset("image", "balanced", _SERVED, "1.5x to 2x", _VLLM),
    Preset("image", "fast", _MANY, "2.75x, 31.1 dB on FLUX.1-dev; " + _NO_FIGURE + " elsewhere",
           _BENCH),
    Preset("video", "high", _F8, _NO_FIGURE, _XDIT + ", without its mask"),
    Preset("video", "balanced", _SERVED, "1.5x to 2x", _VLLM),
    Preset("video", "fast", _MANY, "2.75x, 31.1 dB on FLUX.1-dev; " + _NO_FIGURE + " elsewhere",
           _BENCH),
    Preset("few-step", "high", {**_LIGHT, "Fn_compute_blocks": 16, "Bn_compute_blocks": 16},
           _DISTILLED.format(16, "1.12x", 34.8), _LIGHTNING, steps=(1, 5)),
    Preset("few-step", "balanced", {**_LIGHT, "Fn_compute_blocks": 8, "Bn_compute_blocks": 8},
           _DISTILLED.format(8, "1.22x", 33.1), _LIGHTNING, steps=(1, 5)),
    Preset("few-step", "fast", {**_LIGHT, "Fn_compute_blocks": 1},
           "F1B0: 1.33x in FLOPs, 31.8 dB", _LIGHTNING, steps=(1, 5)),
    Preset("few-step", "high", {**_TURBO_MASKED, "steps_computation_mask": "slow"},
           "at most 1.14x of 8 steps, 1.12x of 9: the mask caches one", _TURBO + ", mask slow",
           steps=(6, FEW_STEPS)),
    Preset("few-step", "balanced", {**_TURBO_MASKED, "steps_computation_mask": "medium"},
           "at most 1.33x of 8 steps, 1.29x of 9: the mask caches two", _TURBO + ", mask medium",
           steps=(6, FEW_STEPS)),
    Preset("few-step", "fast", {**_TURBO_MASKED, "steps_computation_mask": "fast"},
           "1.13x (9 steps, 2 of 4 open ones cached, 4 GPUs, 7.71 s to 6.85 s)", _TURBO,
           steps=(6, FEW_STEPS)),
)
# fmt: on

FAMILIES: dict[str, tuple[str, ...]] = {
    "flux": ("FluxTransformer2DModel",),
    "qwen-image": ("QwenImageTransformer2DModel",),
    "sd3": ("SD3Transformer2DModel",),
    "wan": ("WanTransformer3DModel", "WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel"),
    "wan2.2": (),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel",),
    "mochi": ("MochiTransformer3DModel",),
    "image": (),
    "video": (),
    "few-step": (),
}
"""Families, and the classes by which a model is known; other names that end in 3DModel are videos,
other transformers images. A pipeline with two transformers of "wan" is "wan2.2"."""

ALIASES = {
    "flux.1": "flux", "flux-dev": "flux", "qwen": "qwen-image", "qwenimage": "qwen-image",
    "sd3.5": "sd3", "stable-diffusion-3": "sd3", "wan2.1": "wan", "wan-2.2": "wan2.2",
    "hunyuanvideo": "hunyuan-video", "flux-schnell": "few-step", "flux2-klein": "few-step",
    "z-image-turbo": "few-step", "qwen-image-lightning": "few-step",
    "flux2": "image", "flux.2": "image", "z-image": "image", "chroma": "image",
    "hidream": "image", "cogvideox": "video", "ltx-video": "video", "ltx-2": "video",
}  # fmt: skip
"""Other names of families, and of models that have no row of their own."""


def preset(
    family: object, level: str = "balanced", *, num_inference_steps: int | None = None
) -> dict[str, Any]:
    """Return published settings as keyword arguments of `enable`.

    Args:
        family: a name of `presets()`, as "flux", "wan" or "few-step", or of a model, as
            "z-image-turbo"; or a pipeline or transformer, whose class tells it.
        level: "high" (close to the uncached picture), "balanced" or "fast".
        num_inference_steps: of the requests. Up to 12 the rows for few steps are taken: their
            gain is 1.0x to 1.3x. None: many, or 4 for "few-step".

    Raises:
        TypeError, ValueError: an unknown family or level, or a number of steps below 1.
    """
    return find_preset(family, level, num_inference_steps=num_inference_steps).arguments()


def find_preset(
    family: object, level: str = "balanced", *, num_inference_steps: int | None = None
) -> Preset:
    """Return the row that `preset` takes; raises as it does."""
    check_choice("preset: level", level, LEVELS)
    steps = num_inference_steps
    if steps is not None:
        check_int("preset: num_inference_steps", steps, 1)
    name = _family_of(family)
    if name == "few-step" and steps is None:
        steps = 4
    if steps is not None and steps <= FEW_STEPS:
        name = "few-step"
    elif name == "few-step":
        name, steps = "image", None
    rows = [row for row in PRESETS if (row.family, row.level) == (name, level)]
    for row in rows:
        if row.steps is None or (steps is not None and row.steps[0] <= steps <= row.steps[1]):
            return row
    raise AssertionError(f"no row of {name!r}")  # test_presets looks at all of them


def presets() -> tuple[Preset, ...]:
    """Return all rows: family, level, options, published figures and their source."""
    return PRESETS


def _family_of(family: object) -> str:
    if isinstance(family, str):
        name = family.lower().replace("_", "-")
        name = ALIASES.get(name, name)
        if name in FAMILIES:
            return name
        known = ", ".join((*FAMILIES, *ALIASES))
        raise ValueError(f"preset: family must be one of {known}, got {shown(family)}")
    parts = [family, *getattr(family, "__dict__", {}).values()]
    names = [[cls.__name__ for cls in type(part).__mro__] for part in parts]
    for name, classes in FAMILIES.items():
        found = [mro for mro in names if set(classes) & set(mro)]
        if found:
            return "wan2.2" if name == "wan" and len(found) > 1 else name
    heads = [mro[0] for mro in names if "Transformer" in mro[0] or "DiT" in mro[0]]
    if not heads:
        raise TypeError(
            f"preset: family must be a name, a pipeline or a transformer, got {shown(family)}"
        )
    return "video" if any(head.endswith("3DModel") for head in heads) else "image"
