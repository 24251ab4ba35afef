"""The public functions: `enable`, `disable`, `refresh_context` and their like."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from dbcache.adapters.models.lookup import check_target, find_specs
from dbcache.adapters.patching.attention import ModelAttention, find_backend
from dbcache.adapters.patching.other_caches import refuse_other_caches
from dbcache.adapters.patching.patch_functor import on_trial
from dbcache.adapters.pipelines.switch import replace_setups, switch_off, switch_on
from dbcache.adapters.requests.cached_transformer import handle_of
from dbcache.adapters.requests.enabled import MAX_REQUESTS
from dbcache.adapters.requests.facts import facts_of
from dbcache.adapters.requests.notices import tell
from dbcache.adapters.requests.overview import end_images
from dbcache.adapters.requests.setup import Setup
from dbcache.adapters.signals.recorders import RECORDERS, calibration_of, record
from dbcache.config.cache import DBCacheConfig, ParamsModifier, StackSettings
from dbcache.config.calibration import OPEN
from dbcache.config.options import check_choice, check_flag, check_int, check_type, reject_unknown
from dbcache.config.parallelism import ParallelismConfig
from dbcache.config.predictors import CalibratorConfig
from dbcache.config.quantize import QuantizeConfig
from dbcache.config.renamed import also_called
from dbcache.config.schedule import Source
from dbcache.given import Modifiers, changes_of, check_scheduled, settings_of
from dbcache.graphs.graph import GraphOptions, Recording
from dbcache.modifiers import modified
from dbcache.quantization import NOTHING, plan
from dbcache.started import start_request as start_request
from dbcache.targets import (
    agreement,
    enabled,
    enabled_or_none,
    groups_named,
    has_to_go_first,
    parts,
    resolve,
    shardings_of,
    wrappers,
)

Target = TypeVar("Target")

OF_REQUESTS = ("num_inference_steps", "enable_separate_cfg", "cfg_compute_first")
"""Options of `calibrate`."""

MOST_RUNS = 5
"""Of `capture`: where the first forward only learns, and calls are two branches in turn."""


@also_called("pipe_or_adapter")
def enable(
    model: Target,
    /,
    cache_config: DBCacheConfig | None = None,
    calibrator_config: CalibratorConfig | None = None,
    params_modifiers: ParamsModifier | Sequence[ParamsModifier] | None = None,
    parallelism_config: ParallelismConfig | None = None,
    attention_backend: str | None = None,
    quantize_config: QuantizeConfig | None = None,
    *,
    decide_together: Any = None,
    schedule: Source | None = None,
    target: str | float | None = None,
    guard: float | None = None,
    cuda_graph: bool | str | GraphOptions = False,
    max_requests: int = MAX_REQUESTS,
    **options: Any,
) -> Target:
    """Switch the cache on and return `model`; enabling again replaces the settings.

    Args:
        model: a diffusers pipeline, each call of which is a request; a transformer of a supported
            class, alone (docs/serving.md); or a `BlockAdapter`.
        cache_config: when to cache; defaults as in `DBCacheConfig`. It is copied.
        calibrator_config: how to predict; None reuses the last residual.
        params_modifiers: what single block stacks (or lists) do differently, in order, or all.
        parallelism_config: spread the transformers over the ranks of `torch.distributed`, all of
            which must call this alike. None: each rank has all.
        attention_backend: diffusers' name of one, as in "flash", of these transformers alone until
            `disable`. One in `parallel_kwargs` holds in its place. None leaves it as it is.
        quantize_config: what `quantize` does to the model in the end; `disable` leaves that.
        decide_together: process groups or device meshes, this rank's one along each axis, whose
            ranks cache the same steps, beside those found on the model (FSDP2, diffusers').
        schedule: what `dbcache.tune` wrote, the file or its content, in place of the configs.
        target: which row of it: "2x" or 2.0, "45dB", "16 full", or a level, as "balanced".
        guard: with a schedule, run a step in full that moved more than this times what tuning saw.
        cuda_graph: record CUDA graphs with the decision inside: "device" (one graph), "host" (which
            reads the decision between graphs), "auto" or True, or `GraphOptions`; False: eager.
        max_requests: requests of a transformer that may be open at once, each with own buffers.
        **options: on top of the configs, all that `load_configs` takes, as ``enable_foca=True``.

    Raises:
        TypeError, ValueError: an unknown option, a wrong type or value, an unsupported model, ranks
            whose settings differ. Nothing is changed, but what was spread over ranks is disabled.
        RuntimeError: `torch.distributed` is not initialised, or failed; another rank raised.
        ImportError: a package that is needed is missing; how to install it.
    """
    check_type("enable: parallelism_config", parallelism_config, ParallelismConfig)
    check_int("enable: max_requests", max_requests, 1)
    ranks = parallelism_config, groups_named("enable: decide_together", decide_together)
    with agreement(model, *ranks) as agree:
        configs = (cache_config, calibrator_config, params_modifiers)
        what = settings_of("enable", schedule, target, guard, configs, options)
        how = GraphOptions.of(cuda_graph), find_backend("enable", attention_backend)
        pipe, setups = _agreed_setups(model, schedule, what, ranks, how, agree)
    quantization = NOTHING if quantize_config is None else plan(model, quantize_config)
    switch_on(pipe, setups, max_requests, wrappers(model))
    quantization.apply()
    return model


def _agreed_setups(
    model: object,
    schedule: Source | None,
    what: tuple[StackSettings, Modifiers],
    ranks: tuple[ParallelismConfig | None, Sequence[Any]],
    how: tuple[GraphOptions | None, Any],
    agree: Callable[[dict[str, str]], None],
) -> tuple[Any, list[Setup]]:
    """Return the pipeline, and the setup of each transformer, which all ranks agree on.

    Nothing is changed, but what was spread over ranks is disabled.
    """
    pipe, adapter = resolve(model)
    if has_to_go_first(model, ranks[0]):
        agree({})  # with tp_size, a rank cannot do this alone
        disable(pipe if pipe is not None else model)
    (settings, params_modifiers), (graph_options, attention) = what, how
    functor = adapter.patch_functor if adapter is not None else None
    modules = adapter.transformers() if adapter is not None else []
    with on_trial(functor, modules, [h for m in modules if (h := handle_of(m))]) as patches:
        specs = adapter.specs() if adapter is not None else find_specs(model)
        specs, modifiers = modified(specs, params_modifiers, settings)
        refuse_other_caches([pipe, *(spec.transformer for spec in specs)])
        shardings = shardings_of(specs, pipe, *ranks)
        patched = patches or [None] * len(specs)
        setups = [
            Setup(
                spec,
                settings,
                own,
                graph_options=graph_options,
                sharding=sharding,
                patches=patch,
                attention=ModelAttention.of(spec.transformer, attention),
            )
            for spec, own, sharding, patch in zip(specs, modifiers, shardings, patched, strict=True)
        ]
    check_scheduled("enable", schedule, setups, pipe)
    agree(facts_of(setups, ranks[0]))
    return pipe, setups


@also_called("pipe_or_adapter")
def disable(target: Target) -> Target:
    """Switch the cache off: the model is exactly as it was. Does nothing where it is not on.

    A transformer that another enabled pipeline shares stays enabled for that one.

    Args:
        target: what was enabled: a pipeline, a transformer or a `BlockAdapter`.

    Raises:
        TypeError: it is none of these.
    """
    check_target("dbcache.disable", target)
    end_images(parts(target))
    switch_off([part for part in parts(target) if handle_of(part) is not None])
    return target


def is_enabled(target: object) -> bool:
    """Return whether the cache is on.

    Args:
        target: a pipeline, a transformer or a `BlockAdapter`.
    """
    return bool(enabled_or_none(target))


@also_called("transformer")
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
    check_flag("refresh_context: verbose", verbose)
    handles = enabled(target, "refresh_context")
    changes = changes_of("refresh_context", handles, cache_config, calibrator_config, options)
    renewed = [handle.setup.renewed(changes) for handle in handles]
    tell(renewed, [handle.setup for handle in handles])
    replace_setups(handles, renewed)
    for handle, setup in zip(handles, renewed, strict=True):
        handle.refresh(setup)
        if verbose:
            settings = f"{setup.config.strify()}_{setup.base.predictor.strify()}"
            print(f"dbcache: {type(setup.module).__name__} goes on with {settings}")


@contextmanager
def calibrate(
    target: object,
    *,
    policy: str,
    path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Note what the policies "magcache" and "teacache" need to know beforehand.

        with dbcache.calibrate(pipe, policy="magcache", path="flux.json"):
            pipe("a prompt like those to come", num_inference_steps=28)
        dbcache.enable(pipe, policy="magcache", calibration="flux.json")

    All steps inside are full, with the outputs of the plain model. Several requests are averaged.

    Args:
        target: a pipeline, a transformer or a `BlockAdapter`, as for `enable`; the cache is off
            before and after. Of several transformers each is calibrated by itself.
        policy: "magcache" or "teacache".
        path: the JSON file to write at the end.
        **options: fields of `DBCacheConfig` that say what a request is, for a transformer that is
            called without its pipeline: `num_inference_steps`, `enable_separate_cfg` and
            `cfg_compute_first`.

    Yields:
        A dictionary that is empty inside and holds the content of the file afterwards; it may be
        given as `calibration`, too.

    Raises:
        RuntimeError: the cache is on, or nothing ran. ValueError: another policy, several
            transformers or one whose blocks are not known yet, or requests of different lengths.
            TypeError: another option. FileNotFoundError: there is no folder for `path`. Nothing
            is written then.
    """
    check_choice("calibrate: policy", policy, tuple(RECORDERS))
    reject_unknown("calibrate", options, OF_REQUESTS)
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"calibrate: the folder of path must exist, got {path}; make it")
    if any(handle_of(part) is not None for part in parts(target)):
        raise RuntimeError("calibrate: the cache must be off, got an enabled one; disable it first")
    enable(target, **options, policy=policy, calibration=OPEN, max_warmup_steps=10**9)
    content: dict[str, Any] = {}
    try:
        stacks = [handle.setup.stacks for handle in enabled(target, "calibrate")]
        recorders = record(stacks, policy)
        yield content
        content.update(calibration_of(policy, recorders))
    finally:
        disable(target)
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def capture(target: Any, **inputs: Any) -> list[Recording]:
    """Record the CUDA graphs of a kind of request ahead of the first one, for serving.

    Runs ``target(**inputs)``, as often as it takes for every kind of call to be recorded. Inputs
    of other shapes are recorded when they come, or by another call of this.

    Args:
        target: an enabled pipeline or transformer, with ``cuda_graph`` set.
        **inputs: what a request is called with; for a pipeline two steps are enough, as in
            ``num_inference_steps=2``.

    Returns:
        The new recordings, with what each is for, the seconds that it took and, over all of them,
        the bytes of device memory.

    Raises:
        RuntimeError: the cache or its graphs are not enabled, or nothing could be recorded; the
            error gives the reason.
    """
    handles = enabled(target, "capture")
    executors = [h.setup.graphs for h in handles if h.setup.graphs is not None]
    if not executors:
        raise RuntimeError(
            "capture: CUDA graphs must be enabled first, as in dbcache.enable(..., cuda_graph=True)"
        )
    known = [set(executor.recordings) for executor in executors]
    for i in range(MOST_RUNS):
        with torch.no_grad():
            target(**inputs)
        if i and all(executor.is_settled for executor in executors):
            break
    if not any(executor.recordings for executor in executors):
        reasons = "; ".join(line for executor in executors for line in executor.describe())
        raise RuntimeError(f"capture: the forward must be recordable, but is not: {reasons}")
    pairs = zip(executors, known, strict=True)
    new = [one for now, old in pairs for key, one in now.recordings.items() if key not in old]
    for handle in handles:
        handle.begin_anew(None)
    return new
