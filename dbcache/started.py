"""`start_request`: requests of whoever calls a transformer without its pipeline."""

from __future__ import annotations

from typing import Any

from dbcache.adapters.requests.cached_transformer import OFF, CachedTransformer
from dbcache.adapters.requests.notices import tell
from dbcache.adapters.requests.request import Request
from dbcache.adapters.requests.request_handle import RequestHandle, check_options
from dbcache.config.cache import DBCacheConfig
from dbcache.config.predictors import CalibratorConfig
from dbcache.config.schedule import Source
from dbcache.given import changes_of, check_scheduled, rows_of
from dbcache.overview import summary_of
from dbcache.targets import enabled


def start_request(
    model: object,
    /,
    cache_config: DBCacheConfig | None = None,
    calibrator_config: CalibratorConfig | None = None,
    *,
    schedule: Source | None = None,
    target: str | float | None = None,
    guard: float | None = None,
    **options: Any,
) -> RequestHandle:
    """Start a request, for whoever calls a transformer without its pipeline.

    Forwards belong to the request inside of ``with request:``, in any thread or task, and requests
    may take steps in turn. A step ends when the time changes that the transformer is given, or the
    `step_index` of `RequestHandle.branch`. A time on the device is read once per call.

    Args:
        model: an enabled transformer, pipeline or `BlockAdapter`.
        cache_config: fields that were given in it replace those of `enable`, for this request.
        calibrator_config: replaces the predictor; with as many snapshots as that of `enable`.
        schedule: as in `enable`, in place of the configs; enabled must be a schedule, too, with or
            without a guard as here. `target` and `guard` go with it.
        **options: as in `enable`: all that need no other blocks and no other buffers, as
            `num_inference_steps`, `residual_diff_threshold`, warm-up, limits and masks.

    Raises:
        RuntimeError: the cache is not enabled on it, or `max_requests` are open.
        TypeError, ValueError: as `enable`, or an option that needs other blocks or buffers.
    """
    handles = enabled(model, "start_request")
    given = (cache_config, calibrator_config, None)
    rows = rows_of("start_request", schedule, target, guard, given, options)
    if rows is None:
        changes = changes_of("start_request", handles, cache_config, calibrator_config, options)
    check_scheduled("start_request", schedule, [handle.setup for handle in handles], model)
    pairs: list[tuple[CachedTransformer, Request]] = []
    try:
        for index, handle in enumerate(handles):
            own, overrides = (changes, False) if rows is None else (rows[index], True)
            latest = handle.setup  # another thread may enable it anew meanwhile
            setup = latest.renewed(own, for_request=True, overrides=overrides)
            check_options(setup, latest)
            tell([setup], [latest])
            setup.bind(handle.views, handle.original, handle.reruns)
            request = Request(setup, steps=setup.config.num_inference_steps, follows=True)
            request.clock.by_time = True
            handle.open(request, waits=False)
            pairs.append((handle, request))
            if request.is_closed:
                raise RuntimeError(OFF.format(who=f"start_request: {type(handle.module).__name__}"))
    except BaseException:
        for handle, request in pairs:
            handle.close(request)
        raise
    return RequestHandle(pairs, summary_of)
