"""The public functions: `enable`, `disable`, `summary`, `refresh_context` and their like."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from dbcache.adapters.block_adapter import BlockAdapter, TransformerSpec, like_blocks, unwrap
from dbcache.adapters.block_adapter_registry import BlockAdapterRegistry
from dbcache.adapters.cached_pipeline import CachedPipeline
from dbcache.adapters.cached_transformer import CachedTransformer, handle_of
from dbcache.adapters.models import MODELS
from dbcache.adapters.patch_functor import on_trial
from dbcache.adapters.registry import find_specs
from dbcache.calibrators import CalibratorConfig
from dbcache.config import DBCacheConfig, ParamsModifier, StackSettings, merge
from dbcache.load_configs import split_options
from dbcache.options import check_flag, check_type
from dbcache.summary import LaneSummary, Summary

Target = TypeVar("Target")


def enable(
    target: Target,
    cache_config: DBCacheConfig | None = None,
    calibrator_config: CalibratorConfig | None = None,
    params_modifiers: ParamsModifier | Sequence[ParamsModifier] | None = None,
    **options: Any,
) -> Target:
    """Switch the cache on; enabling again replaces the settings.

    Args:
        target: a diffusers pipeline, a transformer of a supported class, or a `BlockAdapter`.
            With a pipeline, each call of it is a request; a transformer alone starts a new one
            after `num_inference_steps` or at `refresh_context`.
        cache_config: when to cache; defaults as in `DBCacheConfig`. It is copied.
        calibrator_config: how to predict; None reuses the last residual.
        params_modifiers: what single block stacks do differently, in the order of the stacks (of
            the first transformer, then the second); one alone holds for all.
        **options: fields of `DBCacheConfig`, on top of `cache_config`; instead of a
            `calibrator_config` also `enable_taylorseer`, `enable_encoder_taylorseer`,
            `taylorseer_order` and `taylorseer_cache_type`. All that `load_configs` takes.

    Returns:
        `target`.

    Raises:
        TypeError: an unknown option or a wrong type; ValueError: a value that is not allowed, or
            an unsupported model (the error lists what is supported). Nothing is changed then.
    """
    check_type("enable: cache_config", cache_config, DBCacheConfig)
    check_type("enable: calibrator_config", calibrator_config, CalibratorConfig)
    partial, calibrator = _from_options("enable", options, calibrator_config)
    config = merge(cache_config or DBCacheConfig(), partial)
    settings = StackSettings(config, calibrator or CalibratorConfig())
    pipe, adapter = _resolve(target)
    functor = adapter.patch_functor if adapter is not None else None
    modules = adapter.transformers() if adapter is not None else []
    handles = [handle for module in modules if (handle := handle_of(module)) is not None]
    with on_trial(functor, modules, handles) as patches:
        specs = adapter.specs() if adapter is not None else find_specs(target)
        transformers = [
            CachedTransformer(spec, settings, modifiers, by_request=pipe is not None)
            for spec, modifiers in zip(specs, _modifiers(specs, params_modifiers), strict=True)
        ]
    for transformer, patch in zip(transformers, patches, strict=False):
        transformer.patches = patch
    disable(pipe if pipe is not None else target)
    for transformer in transformers:
        _replace(handle_of(transformer.module), transformer)
    if pipe is not None:
        CachedPipeline(pipe, [spec.transformer for spec in specs]).install()
    return target


def disable(target: Target) -> Target:
    """Switch the cache off: the model is exactly as it was. Does nothing where it is not on.

    A transformer that another enabled pipeline shares stays enabled for that one.

    Args:
        target: what was enabled: a pipeline, a transformer or a `BlockAdapter`.
    """
    for part in _parts(target):
        handle = handle_of(part)
        if isinstance(handle, CachedPipeline):
            transformers = handle.transformers
            handle.remove()
            for transformer in transformers:
                transformer.pipelines.discard(handle)
                if not transformer.pipelines:
                    transformer.remove()
        elif handle is not None:
            handle.remove()
            for pipeline in list(handle.pipelines):
                if not pipeline.transformers:
                    pipeline.remove()
    return target


def summary(target: object) -> Summary:
    """Return what the last request did, per lane; reads it back from the device.

    Args:
        target: what was enabled: a pipeline, a transformer or a `BlockAdapter`.

    Raises:
        RuntimeError: the cache is not enabled on it.
    """
    lanes, notes = [], []
    for transformer in _enabled(target, "summary"):
        name = type(transformer.module).__name__
        notes += transformer.notes()
        for stack in transformer.stacks:
            if not stack.entries:
                notes.append(f"{stack.name}: all {stack.num_blocks} blocks run on every step")
            ran = {branch: lane for branch, lane in stack.lanes.items() if lane.step}
            for branch, lane in ran.items():
                reasons, diffs = lane.trace()
                lanes.append(
                    LaneSummary.from_trace(
                        reasons,
                        diffs,
                        transformer=name,
                        stack=stack.name,
                        branch=transformer.branches.shown(branch, ran),
                        threshold=stack.settings.cache.threshold,
                        follows=stack.leader.name if stack.leader is not None else None,
                        megabytes=lane.nbytes() / 1e6,
                    )
                )
    return Summary(lanes, notes)


def refresh_context(
    target: object,
    cache_config: DBCacheConfig | None = None,
    calibrator_config: CalibratorConfig | None = None,
    verbose: bool = False,
    **options: Any,
) -> None:
    """Start a new request on a transformer that is called without its pipeline.

    Args:
        target: the enabled transformer (or `BlockAdapter`).
        cache_config: fields that were given in it replace those in force.
        calibrator_config: replaces the predictor.
        verbose: print the settings that are now in force, one line per transformer.
        **options: as in `enable`, for example ``num_inference_steps=28``.

    Raises:
        RuntimeError: the cache is not enabled on it.
        TypeError, ValueError: as `enable`; nothing is changed then.
    """
    check_type("refresh_context: cache_config", cache_config, DBCacheConfig)
    check_type("refresh_context: calibrator_config", calibrator_config, CalibratorConfig)
    check_flag("refresh_context: verbose", verbose)
    partial, calibrator = _from_options("refresh_context", options, calibrator_config)
    partial = DBCacheConfig(**{**(cache_config.given if cache_config else {}), **partial.given})
    changes = ParamsModifier(cache_config=partial, calibrator_config=calibrator)
    transformers = _enabled(target, "refresh_context")
    renewed = [transformer.renewed(changes) for transformer in transformers]
    for old, new in zip(transformers, renewed, strict=True):
        if new is not old:
            _replace(old, new)
        new.refresh()
        if verbose:
            settings = f"{new.config.strify()}_{new.settings.calibrator.strify()}"
            print(f"dbcache: {type(new.module).__name__} goes on with {settings}")


def supported_pipelines() -> tuple[int, list[str]]:
    """Return how many transformer classes are supported by name, and these with their models.

    A pipeline is supported if one of its transformers is; others work through a `BlockAdapter`.
    """
    names = [f"{row.transformer}: {row.models}" for row in MODELS]
    return len(names), names


def _from_options(
    who: str, options: dict[str, Any], calibrator_config: CalibratorConfig | None
) -> tuple[DBCacheConfig, CalibratorConfig | None]:
    """Return flat options as a partial config, and a copy of the predictor."""
    fields, calibrator = split_options(who, options)
    if calibrator is not None and calibrator_config is not None:
        raise ValueError(
            f"{who}: calibrator_config must not be given together with TaylorSeer's options, got "
            f"both; set them in the config"
        )
    return DBCacheConfig(**fields), copy.copy(calibrator_config or calibrator)


def _resolve(target: object) -> tuple[Any, BlockAdapter | None]:
    """Return (pipeline or None, adapter or None: the table of models says what to cache)."""
    if isinstance(target, BlockAdapter):
        return target.pipe, target
    pipe = None if isinstance(target, torch.nn.Module) else target
    return pipe, BlockAdapterRegistry.adapter_of(unwrap(target))


def _modifiers(
    specs: list[TransformerSpec], given: ParamsModifier | Sequence[Any] | None
) -> list[list[ParamsModifier | None]]:
    """Return one modifier per stack: those given to `enable`, else those of the adapter."""
    if given is None:
        return [[stack.modifier for stack in spec.stacks] for spec in specs]
    counts = [len(spec.stacks) for spec in specs]
    return like_blocks("enable: params_modifiers", given, counts, ParamsModifier)


def _replace(old: CachedTransformer | None, new: CachedTransformer) -> None:
    """Install `new` where `old` was; pipelines that share the transformer go on with it."""
    if old is not None:
        new.pipelines = old.pipelines
        old.remove()
    new.install()


def _parts(target: object) -> list[object]:
    """Return the objects that may carry a handle, pipeline first."""
    if not isinstance(target, BlockAdapter):
        return [unwrap(target)]
    return [part for part in (target.pipe, *target.transformers()) if part is not None]


def _enabled(target: object, who: str) -> list[CachedTransformer]:
    """Return the cached transformers of `target`."""
    for part in _parts(target):
        handle = handle_of(part)
        if isinstance(handle, CachedPipeline):
            return handle.transformers
        if handle is not None:
            found = [handle_of(module) for module in _parts(target)]
            return [transformer for transformer in found if transformer is not None]
    raise RuntimeError(
        f"{who}: the cache must be enabled on it first, got {type(target).__name__}; call "
        f"dbcache.enable"
    )
