"""What users read of the cache: `summary`, `strify`, and which models are supported."""

from __future__ import annotations

import logging as log
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dbcache.adapters.blocks.block_adapter import BlockAdapter
from dbcache.adapters.models.matrix import matrix
from dbcache.adapters.models.series import pipelines
from dbcache.adapters.pipelines.cached_pipeline import CachedPipeline
from dbcache.adapters.requests import overview
from dbcache.adapters.requests.cached_transformer import CachedTransformer, handle_of
from dbcache.adapters.requests.record import RequestRecord, all_run
from dbcache.adapters.requests.request import Request
from dbcache.config.cache import DBCacheConfig, merge
from dbcache.config.files import load_configs
from dbcache.config.options import check_flag
from dbcache.config.predictors import CalibratorConfig
from dbcache.config.renamed import also_called
from dbcache.config.steps_mask import steps_mask
from dbcache.results.gathering import paired
from dbcache.results.settings import python_of
from dbcache.results.summary import Summary
from dbcache.targets import enabled, name_of, parts

LOGGER = log.getLogger("dbcache")


@also_called("adapter_or_others")
def summary(target: object, details: bool = False, logging: bool = True) -> Summary:
    """Return what the last request did, per lane, and show it; reads it back from the device.

    Args:
        target: what was enabled: a pipeline, a transformer or a `BlockAdapter`.
        details: show Markdown under the name of the pipeline, with a line per step.
        logging: show the text: at level INFO of the logger "dbcache" where that has a handler for
            it, else on the standard output. False is silent.

    Raises:
        RuntimeError: the cache is not enabled on it.
    """
    check_flag("summary: details", details)
    check_flag("summary: logging", logging)
    handles = enabled(target, "summary")
    pipeline = next(
        (h for part in parts(target) if isinstance(h := handle_of(part), CachedPipeline)), None
    )
    records = [] if pipeline is None else pipeline.shown()
    seconds = None if pipeline is None else pipeline.seconds
    if not records:
        records = [record for handle in handles if (record := overview.shown(handle)) is not None]
    totals: Counter[str] = Counter()
    for handle in handles:
        totals.update(handle.totals.read())
    notes = [note for handle in handles for note in overview.notes(handle)]
    found = _summary(records, notes, details, handles, dict(totals), name_of(target), seconds)
    if logging:
        _show(str(found))
    return found


def _show(text: str) -> None:
    """Let the user see a text, who may have set up logging or not."""
    if LOGGER.isEnabledFor(log.INFO) and LOGGER.hasHandlers():
        LOGGER.info("%s", text)
    else:
        print(text)


def _summary(
    records: Sequence[RequestRecord],
    notes: list[str],
    details: bool,
    handles: Sequence[CachedTransformer] = (),
    totals: dict[str, int] | None = None,
    name: str = "",
    seconds: float | None = None,
) -> Summary:
    if not records:
        notes = notes + [text for handle in handles for text in all_run(handle.setup)]
    return Summary(
        paired([lane for record in records for lane in record.lanes()]),
        [*notes, *(note for record in records for note in record.notes)],
        details,
        totals or {},
        sum(overview.nbytes(handle) for handle in handles),
        name,
        _config(handles),
        seconds,
        bool(records) or any(overview.has_run(handle) for handle in handles),
    )


def _config(handles: Sequence[CachedTransformer]) -> str:
    """Return the Python that enables the cache with the same settings."""
    if not handles:
        return ""
    base = handles[0].setup.base
    modifiers = [modifier for handle in handles for modifier in handle.setup.modifiers]
    return python_of(base.cache, base.predictor, modifiers)


def summary_of(requests: Sequence[Request], details: bool) -> Summary:
    """Return the summary of requests that the user started."""
    records = [request.record or request.shown() for request in requests]
    return _summary(records, [], details)


@also_called("adapter_or_others")
def strify(target: object) -> str:
    """Return a short name of what is enabled and of how much was cached, for files and tables.

    The settings and the last request of the first block stack: ``DBCache_F8B0_W8I1M0MC0_R0.08``,
    the predictor, ``S`` and the steps cached; under DBPrune also ``P`` and the percentage of the
    blocks left out.

    Args:
        target: what was enabled: a pipeline, a transformer or a `BlockAdapter`; or a config, a
            summary, a lane of one, or options as `load_configs` takes them.

    Raises:
        RuntimeError: the cache is not enabled on it.
        TypeError, ValueError: options that are not allowed.
    """
    if isinstance(target, list) and target:
        target = target[0]
    if isinstance(target, Mapping):
        configs = load_configs(target)
        configs["calibrator_config"] = configs["calibrator_config"] or CalibratorConfig()
        configs = [config for config in configs.values() if config is not None]
        return "_".join(x.strify() if hasattr(x, "strify") else str(x) for x in configs)
    if hasattr(target, "strify"):
        return str(target.strify())
    setup = enabled(target, "strify")[0].setup
    lanes = summary(target, logging=False).lanes
    parts = [_with_mask(setup.config, lanes), setup.base.predictor.strify()]
    if lanes:
        parts.append(f"S{len(lanes[0].cached_steps)}")
        if lanes[0].pruned is not None:
            parts.append(f"P{100 * lanes[0].pruned_ratio:.1f}")
    return "_".join(parts)


def _with_mask(config: DBCacheConfig, lanes: Sequence[Any]) -> str:
    """Return the name of a config; a named mask is spelt out once its length is known."""
    mask = config.steps_computation_mask
    if isinstance(mask, str) and config.num_inference_steps is None and lanes:
        spelt = steps_mask(total_steps=lanes[0].steps, mask_policy=mask)
        config = merge(config, DBCacheConfig(steps_computation_mask=spelt))
    return config.strify()


def supported_pipelines() -> tuple[int, list[str]]:
    """Return how many series of pipelines are supported by name, and these, as in ``"Flux*"``.

    A pipeline whose class has another name is supported, too, if its transformer's class is in
    `supported_matrix`; others work through a `BlockAdapter`.
    """
    names = pipelines()
    return len(names), names


def supported_matrix() -> str:
    """Return a Markdown table: for each transformer class, what tests cover.

    The columns are the cache, ControlNet residuals, and the model spread over ranks along the
    sequence or by its weights. docs/models.md names the tests.
    """
    from dbcache.parallel.plans import PLANS  # torch.distributed only where it is used

    return matrix(PLANS)


@also_called("pipe")
def get_adapter(target: object) -> BlockAdapter | None:
    """Return the adapter that `enable` uses for a pipeline or transformer, None without one.

    Its fields tell transformers, lists of blocks and patterns; `enable` takes it in place of the
    target.

    Args:
        target: a pipeline or transformer, with the cache on or off.

    Raises:
        TypeError: `target` is a name: an adapter is made of a model's own blocks.
    """
    from dbcache.adapters.models.known_adapter import adapter_for

    return adapter_for(target)
