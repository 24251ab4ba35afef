"""A sampling of ComfyUI as a request: what happens between the nodes and the model.

The model is shared by all workflows, so it is changed only while one samples. Guidance may be one
forward or several, and that may change from step to step with the memory that is free; a lane is
known by the conditions that a forward is for (`uuids`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import dbcache
from dbcache.adapters.blocks.registry import BlockAdapterRegistry
from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.patching.instance_method import InstanceMethod
from dbcache.config.cache import DBCacheConfig, merge
from dbcache.config.options import check_number
from dbcache.config.steps_mask import steps_mask
from dbcache.integrations.no_ops import NoOps
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.lanes.plan import make_plan

LOGGER = logging.getLogger("dbcache.comfyui")

FAMILIES = {
    "Flux": "flux",
    "WanModel": "wan",
    "HunyuanVideo": "hunyuan-video",
    "MMDiT": "sd3",
    "OpenAISignatureMMDITWrapper": "sd3",
    "AsymmDiTJoint": "mochi",
    "QwenImageTransformer2DModel": "qwen-image",
}
"""Families of `dbcache.preset`, by ComfyUI's classes."""


@dataclass(frozen=True)
class Choices:
    """What the node was set to.

    Attributes:
        level: of `dbcache.preset`.
        options: of `dbcache.enable`, on top of the preset.
        start: share of the sampling at which caching may begin; `end`, at which it ends.
        predictor: None: that of the preset; "none": the last residual is reused.
    """

    level: str
    options: Mapping[str, Any]
    start: float = 0.0
    end: float = 1.0
    predictor: str | None = None

    def __post_init__(self) -> None:
        check_number("DBCache: start_percent", self.start, high=1.0)
        check_number("DBCache: end_percent", self.end, high=1.0)
        self.enable_options("image", 28)  # what is wrong is said where it is set

    def enable_options(self, family: str, steps: int) -> dict[str, Any]:
        """Return the arguments of `dbcache.enable` for a sampling of so many steps.

        Raises:
            ValueError, TypeError: an unknown level, or a value that is not allowed.
        """
        options = dbcache.preset(family, self.level, num_inference_steps=steps)
        own = dict(self.options)
        if "max_warmup_steps" in own:  # a mask would cut it off
            own["steps_computation_mask"] = None
        config = options["cache_config"] = merge(options["cache_config"], DBCacheConfig(**own))
        if "policy" in own:  # what the preset says of another policy was not chosen
            config.__dict__["_given"] &= {*own, "max_warmup_steps"}
        if self.predictor == "none":
            options["calibrator_config"] = None
        elif self.predictor is not None:
            predictor = {
                f"{switch}_{self.predictor}": True for switch in ("enable", "enable_encoder")
            }
            options["calibrator_config"] = dbcache.load_configs(predictor)["calibrator_config"]
        return options


class Sampling:
    """The cache of one patched model.

    Args:
        choices: of the node.

    Attributes:
        text: what the last sampling did.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.text = "nothing was sampled yet"
        self._no_ops = NoOps(LOGGER)

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a sampling as a request: ComfyUI's wrapper of the type "outer_sample".

        Args:
            executor: goes on; its `class_obj` is the guider.
            *args: noise, latents, sampler, sigmas and more.
            **kwargs: the same by name.

        Raises:
            ValueError: the model has no list of blocks, as a UNet.
        """
        model = executor.class_obj.model_patcher.model
        module = unwrap(model.diffusion_model)
        sigmas = [float(sigma) for sigma in kwargs.get("sigmas", args[3] if len(args) > 3 else ())]
        if dbcache.is_enabled(module):  # a sampling within another one: the outer one goes on
            return executor(*args, **kwargs)
        noise = kwargs.get("noise", args[0] if args else None)
        options = self._options(model, family_of(module, noise), sigmas)
        target: Any = module
        if BlockAdapterRegistry.adapter_of(module) is None:
            target = dbcache.BlockAdapter(transformer=module, auto=True)
        dbcache.enable(target, **options)
        try:
            return self._run(module, max(1, len(sigmas) - 1), lambda: executor(*args, **kwargs))
        finally:
            dbcache.disable(module)

    def _options(self, model: Any, family: str, sigmas: list[float]) -> dict[str, Any]:
        steps = max(1, len(sigmas) - 1)
        options = self.choices.enable_options(family, steps)
        outside = self._outside(model, sigmas)
        if any(outside):
            options["cache_config"] = full_at(options["cache_config"], outside)
        return options

    def _outside(self, model: Any, sigmas: list[float]) -> list[bool]:
        """Return, per step, whether it lies before the start or after the end of caching."""
        if (self.choices.start, self.choices.end) == (0.0, 1.0):
            return []
        sigma_of = model.model_sampling.percent_to_sigma
        first, last = float(sigma_of(self.choices.start)), float(sigma_of(self.choices.end))
        return [not last < sigma <= first for sigma in sigmas[:-1]]

    def _run(self, module: torch.nn.Module, steps: int, run: Any) -> Any:
        request = dbcache.start_request(module, num_inference_steps=steps)
        names: dict[Any, str] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            name = lane_of(names, (*kwargs.values(), *args))
            with request if name is None else request.branch(name):
                return patch.original(*args, **kwargs)

        # around the cache's own: ComfyUI's wrapper of the model runs inside of its forward, where
        # the step has begun
        patch = InstanceMethod(module, "forward", forward)
        patch.install()
        is_whole = False
        try:
            with request:
                output = run()
            is_whole = True
        finally:
            patch.remove()
            summary = request.summary()
            request.close()
            self.text = str(summary)
            if is_whole:
                self._no_ops.look_at(summary)
        return output


def family_of(module: torch.nn.Module, noise: Any) -> str:
    """Return the family of presets: of the class, else of what it extends, else of the latents."""
    is_video = isinstance(noise, torch.Tensor) and noise.ndim == 5
    known = (FAMILIES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in FAMILIES)
    return next(known, "video" if is_video else "image")


def lane_of(names: dict[Any, str], values: tuple[Any, ...]) -> str | None:
    """Return the name of the lane of a forward; None where nothing says which conditions it is for.

    Args:
        names: those given so far, by conditions.
        values: arguments of the forward, among them the options of the transformer.
    """
    options = next((v for v in values if isinstance(v, dict) and "cond_or_uncond" in v), {})
    kinds = tuple(options.get("cond_or_uncond", ()))
    key = kinds, tuple(options.get("uuids") or ())  # an area's uuid is that of both its prompts
    if not kinds:
        return None
    if key not in names:
        name = "+".join("uncond" if kind == 1 else "cond" for kind in kinds) or "cond"
        same = sum(known.split(" ")[0] == name for known in names.values())
        names[key] = f"{name} ({same + 1})" if same else name
    return names[key]


def full_at(config: DBCacheConfig, outside: list[bool]) -> DBCacheConfig:
    """Return a config whose requests are full at the steps `outside`, beside those that were."""
    steps, mask = len(outside), config.steps_computation_mask
    if isinstance(mask, str):
        mask = steps_mask(mask_policy=mask, total_steps=steps)
        config = merge(config, DBCacheConfig(steps_computation_mask=mask))
    plan = make_plan(config, steps, steps)
    full = [code in (PlanCode.WARMUP, PlanCode.MASK) for code in plan]
    mask = [int(is_full or is_out) for is_full, is_out in zip(full, outside, strict=True)]
    return merge(config, DBCacheConfig(steps_computation_mask=mask))
