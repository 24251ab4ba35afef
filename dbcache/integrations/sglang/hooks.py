"""What stands around the functions by which SGLang uses cache-dit.

Each hook is called with the engine's function and its arguments, and falls through to it
where dbcache is not chosen, or not on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

import dbcache
from dbcache.adapters.blocks.block_adapter import BlockAdapter
from dbcache.adapters.blocks.patterns import ForwardPattern
from dbcache.integrations import prometheus
from dbcache.integrations.blocks import known_or_auto
from dbcache.integrations.sglang.settings import OWN, check, is_chosen, options_of, split

LOG = logging.getLogger(__name__)

RUNTIME = "sglang.multimodal_gen.runtime"
INTEGRATION = f"{RUNTIME}.cache.cache_dit_integration"
STAGE = f"{RUNTIME}.pipelines_core.stages.denoising.DenoisingStage"
DIFFUSERS = f"{RUNTIME}.pipelines.diffusers_pipeline.DiffusersPipeline"

MARK = "_sglang_cache_dit_adapter"
"""Attribute by which models of the engine see that their blocks are cached."""


def _engine() -> Any:
    """Return the engine's module around which the hooks stand."""
    return sys.modules[INTEGRATION]


def enable(
    original: Callable[..., torch.nn.Module],
    transformer: torch.nn.Module,
    config: Any,
    model_name: str = "transformer",
    sp_group: Any = None,
    tp_group: Any = None,
    has_separate_cfg: bool = False,
    joint_cfg_decision: bool = False,
) -> torch.nn.Module:
    """Switch the cache on, for a model with one transformer."""
    if not is_chosen() or not config.enabled:
        return original(
            transformer,
            config,
            model_name,
            sp_group,
            tp_group,
            has_separate_cfg,
            joint_cfg_decision,
        )
    engine = _engine()
    groups = [sp_group, tp_group]
    if joint_cfg_decision and engine.get_classifier_free_guidance_world_size() > 1:
        groups.append(engine.get_dit_group())
    custom = engine._build_custom_block_adapter(transformer, has_separate_cfg=has_separate_cfg)
    if custom is not None:
        target: Any = BlockAdapter(
            transformer=transformer,
            blocks=custom.blocks,
            forward_pattern=_patterns(custom.forward_pattern),
        )
    else:
        target = known_or_auto(transformer, LOG)
    _mount(model_name, transformer, target, config, groups, has_separate_cfg)
    return transformer


def enable_dual(
    original: Callable[..., Any],
    transformer: torch.nn.Module,
    transformer_2: torch.nn.Module,
    primary_config: Any,
    secondary_config: Any,
    model_name: str = "wan2.2",
    sp_group: Any = None,
    tp_group: Any = None,
    has_separate_cfg: bool = True,
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Switch the cache on, for a model with two transformers, each with its own settings."""
    pair = transformer, transformer_2
    configs = primary_config, secondary_config
    spec = _engine().DUAL_TRANSFORMER_BLOCK_ADAPTER_SPECS.get(model_name)
    if not is_chosen() or not primary_config.enabled or spec is None:
        return original(*pair, *configs, model_name, sp_group, tp_group, has_separate_cfg)
    is_separate = spec.has_separate_cfg and has_separate_cfg
    mounted = []
    try:
        for number, (module, config) in enumerate(zip(pair, configs, strict=True)):
            target = BlockAdapter(
                transformer=module,
                blocks=getattr(module, spec.blocks_attr[number]),
                forward_pattern=_patterns(spec.forward_pattern[number]),
            )
            who = f"{model_name}, transformer {number + 1}"
            _mount(who, module, target, config, [sp_group, tp_group], is_separate)
            mounted.append(module)
    except BaseException:
        for module in mounted:
            dbcache.disable(module)
        raise
    return pair


def refresh(
    original: Callable[..., None],
    transformer: torch.nn.Module,
    num_inference_steps: int,
    scm_preset: str | None = None,
    verbose: bool = False,
    steps_computation_mask: list[int] | None = None,
    steps_computation_policy: str | None = None,
) -> None:
    """Begin the next request."""
    more = (scm_preset, verbose, steps_computation_mask, steps_computation_policy)
    if not dbcache.is_enabled(transformer):
        return original(transformer, num_inference_steps, *more)
    _tell(transformer)
    if steps_computation_mask is None and scm_preset is not None:
        steps_computation_mask = dbcache.steps_mask(
            mask_policy=scm_preset, total_steps=num_inference_steps
        )
    options: dict[str, Any] = {"num_inference_steps": num_inference_steps}
    if steps_computation_mask is not None:
        options["steps_computation_mask"] = steps_computation_mask
        options["steps_computation_policy"] = steps_computation_policy or "dynamic"
    dbcache.refresh_context(transformer, verbose=verbose, **options)
    prometheus.publish_where_installed()  # what is over now
    return None


def refresh_dual(
    original: Callable[..., None],
    transformer: torch.nn.Module,
    transformer_2: torch.nn.Module,
    num_high_noise_steps: int,
    num_low_noise_steps: int,
    scm_preset: str | None = None,
    verbose: bool = False,
    steps_computation_mask: list[int] | None = None,
    steps_computation_mask_2: list[int] | None = None,
    steps_computation_policy: str | None = None,
) -> None:
    """Begin the next request on both transformers."""
    masks = steps_computation_mask, steps_computation_mask_2
    pair, steps = (transformer, transformer_2), (num_high_noise_steps, num_low_noise_steps)
    if not dbcache.is_enabled(transformer):
        return original(*pair, *steps, scm_preset, verbose, *masks, steps_computation_policy)
    for module, count, mask in zip(pair, steps, masks, strict=True):
        refresh(original, module, count, scm_preset, verbose, mask, steps_computation_policy)
    return None


def disable(
    original: Callable[[torch.nn.Module], torch.nn.Module], transformer: torch.nn.Module
) -> torch.nn.Module:
    """Switch the cache off: the transformer is as it was."""
    if not dbcache.is_enabled(transformer):
        return original(transformer)
    _tell(transformer)
    dbcache.disable(transformer)
    if getattr(transformer, MARK, None) == "dbcache":
        delattr(transformer, MARK)
    return transformer


def resolve(
    original: Callable[[Any], dict[str, Any]], raw: dict[str, Any] | None
) -> dict[str, Any]:
    """Check the `cache_dit_params` of a request, in which dbcache's own options may stand, too.

    Raises:
        TypeError, ValueError: an unknown option or a value that is not allowed; the request fails.
    """
    if not is_chosen() or not isinstance(raw, dict):
        return original(raw)
    engine = _engine()
    theirs, own = split(raw, engine.CACHE_DIT_REQUEST_PARAM_KEYS)
    check("cache_dit_params", own)
    second = raw.get("secondary")
    if not isinstance(second, dict):
        return original(theirs) | own
    theirs["secondary"], own_second = split(second, engine.CACHE_DIT_REQUEST_KNOB_KEYS)
    check("cache_dit_params['secondary']", own_second)
    overrides = original(theirs) | own
    overrides["secondary"] |= own_second
    return overrides


def build_config(original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any) -> Any:
    """Let the engine's config of a request carry the options that are dbcache's own."""
    config = original(stage, *args, **kwargs)
    if is_chosen():
        overrides = stage._cache_dit_request_overrides
        if kwargs.get("secondary"):
            overrides = overrides | (overrides.get("secondary") or {})
        engine = _engine()
        setattr(config, OWN, split(overrides, engine.CACHE_DIT_REQUEST_PARAM_KEYS)[1])
    return config


def apply_to_pipeline(
    original: Callable[..., Any], backend: Any, pipe: Any, server_args: Any
) -> Any:
    """Enable a diffusers pipeline by the file of ``--cache-dit-config`` (the diffusers backend)."""
    if not is_chosen() or not server_args.cache_dit_config:
        return original(backend, pipe, server_args)
    dbcache.enable(pipe, **dbcache.load_configs(server_args.cache_dit_config))
    LOG.info("dbcache: enabled on %s, %s", type(pipe).__name__, dbcache.strify(pipe))
    return pipe


def _mount(
    who: str,
    transformer: torch.nn.Module,
    target: Any,
    config: Any,
    groups: list[Any],
    is_separate: bool,
) -> None:
    named = [group for group in groups if group is not None]
    options = options_of(config, enable_separate_cfg=is_separate)
    dbcache.enable(target, decide_together=named or None, **options)
    if not hasattr(transformer, MARK):
        setattr(transformer, MARK, "dbcache")
    LOG.info("dbcache: enabled on %s, %s", who, dbcache.strify(transformer))


def _patterns(given: Any) -> Any:
    """Return cache-dit's pattern, or patterns, as those of dbcache."""
    if isinstance(given, list | tuple):
        return [ForwardPattern[pattern.name] for pattern in given]
    return ForwardPattern[given.name]


def _tell(transformer: torch.nn.Module) -> None:
    """Log what the request did that ended; that it cached nothing, the core says."""
    if LOG.isEnabledFor(logging.DEBUG):
        LOG.debug("%s", dbcache.summary(transformer, logging=False))


HOOKS: dict[str, Callable[..., Any]] = {
    f"{INTEGRATION}.enable_cache_on_transformer": enable,
    f"{INTEGRATION}.enable_cache_on_dual_transformer": enable_dual,
    f"{INTEGRATION}.refresh_context_on_transformer": refresh,
    f"{INTEGRATION}.refresh_context_on_dual_transformer": refresh_dual,
    f"{INTEGRATION}.disable_cache_on_transformer": disable,
    f"{INTEGRATION}.resolve_cache_dit_request_overrides": resolve,
    f"{STAGE}._build_cache_dit_config": build_config,
    f"{DIFFUSERS}._apply_cache_dit": apply_to_pipeline,
}
"""What stands around which function of the engine."""
