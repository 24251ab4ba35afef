"""What users of ComfyUI see: the nodes and their inputs."""

from __future__ import annotations

from typing import Any

from dbcache.integrations.comfyui.sampling import Choices, Sampling

OUTER_SAMPLE = "outer_sample"
OWN = "dbcache"
"""Type and key of dbcache's wrapper."""

FROM_PRESET = "as the preset"
LEVELS = ("balanced", "high", "fast")
PREDICTORS = ("none", "taylorseer", "hermite", "foca", "dmd", "spectrum")
POLICIES = ("dbcache", "easycache")
"""Those that need to know nothing of a model."""


def _number(kind: str, most: float, step: float, text: str, least: float = -1) -> Any:
    limits = {"default": least, "min": least, "max": most, "step": step, "tooltip": text}
    return (kind, limits)


class DBCache:
    """Gives out a model that skips most of its blocks on steps where little changed."""

    CATEGORY = "advanced/model"
    DESCRIPTION = __doc__
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802 - ComfyUI's name
        """Return what the node takes."""
        return {
            "required": {
                "model": ("MODEL",),
                "preset": ([*LEVELS], {"tooltip": "high: close to the uncached picture"}),
            },
            "optional": {
                "threshold": _number("FLOAT", 1.0, 0.01, "higher caches more; -1: as the preset"),
                "warmup_steps": _number("INT", 1000, 1, "full steps first; -1: as the preset"),
                "start_percent": _number("FLOAT", 1.0, 0.001, "where caching may begin", 0.0),
                "end_percent": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.001}),
                "predictor": (
                    [FROM_PRESET, *PREDICTORS],
                    {"tooltip": "of what skipped blocks add"},
                ),
                "policy": (
                    [FROM_PRESET, *POLICIES],
                    {"tooltip": "what decides whether a step is cached"},
                ),
            },
        }

    def patch(
        self,
        model: Any,
        preset: str,
        threshold: float = -1.0,
        warmup_steps: int = -1,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        predictor: str = FROM_PRESET,
        policy: str = FROM_PRESET,
    ) -> tuple[Any]:
        """Return a copy of the model that is cached while it samples; `model` is left alone.

        Raises:
            ValueError: a value that is not allowed.
        """
        options: dict[str, Any] = {}
        if threshold >= 0:
            options["residual_diff_threshold"] = threshold
        if warmup_steps >= 0:
            options["max_warmup_steps"] = warmup_steps
        if policy != FROM_PRESET:
            options["policy"] = policy
        chosen = None if predictor == FROM_PRESET else predictor
        sampling = Sampling(Choices(preset, options, start_percent, end_percent, chosen))
        if sampling_of(model) is not None:
            raise ValueError("DBCache: the model must not be cached yet, got one of a DBCache node")
        patched = model.clone()
        patched.add_wrapper_with_key(OUTER_SAMPLE, OWN, sampling.outer_sample)
        return (patched,)


def sampling_of(model: Any) -> Sampling | None:
    """Return the cache of a model, None if no DBCache node made it or what it was copied from.

    Copies share the wrappers; all else that a model carries is copied to the depth.
    """
    wrappers = model.get_wrappers(OUTER_SAMPLE, OWN)
    return wrappers[0].__self__ if wrappers else None


class DBCacheSummary:
    """Tells what the cache did in the last sampling of a model."""

    CATEGORY = "advanced/model"
    DESCRIPTION = __doc__
    FUNCTION = "show"
    OUTPUT_NODE = True
    RETURN_TYPES = ("LATENT", "STRING")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802 - ComfyUI's name
        """Return what the node takes: the latents are there so that it runs after the sampler."""
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:  # noqa: N802 - ComfyUI's name
        """Say that the result may differ each time."""
        return float("nan")

    def show(self, model: Any, latent: Any) -> dict[str, Any]:
        """Return the latents as they are, and the summary as text."""
        sampling = sampling_of(model)
        text = "no DBCache node is connected" if sampling is None else sampling.text
        return {"ui": {"text": (text,)}, "result": (latent, text)}
