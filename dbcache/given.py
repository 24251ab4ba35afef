"""What `enable` and its like are given as settings: configs, flat options, a schedule file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from dbcache.adapters.requests.cached_transformer import CachedTransformer
from dbcache.adapters.requests.setup import Setup
from dbcache.config.cache import DBCacheConfig, ParamsModifier, StackSettings, merge
from dbcache.config.files import partial_config, split_options
from dbcache.config.options import check_type, shown
from dbcache.config.predictors import CalibratorConfig
from dbcache.config.schedule import Schedule, Source

BESIDE = (
    "cache_dtype", "enable_separate_cfg", "cfg_compute_first", "num_inference_steps",
    "cache_type",
)  # fmt: skip
"""Options that may be given beside a schedule, which sets all others."""


CONFIGS = ("cache_config", "calibrator_config", "params_modifiers")


class PerTransformer(list[ParamsModifier]):
    """Settings of each transformer, for all of its stacks."""


def rows_of(
    who: str,
    schedule: Source | None,
    target: Any,
    guard: float | None,
    given: tuple[object, object, object],
    options: Mapping[str, Any],
) -> PerTransformer | None:
    """Return what a schedule sets per transformer, with `options` on top; None without one.

    Args:
        who: the function that was called, for errors.
        schedule: a file, or its content.
        target: which row of it.
        guard: as in `Schedule.settings`.
        given: `cache_config`, `calibrator_config` and `params_modifiers`.
        options: flat options that were given beside it.

    Raises:
        TypeError, ValueError: a target or guard without a schedule, a schedule with settings of
            another kind, or a schedule or target that is not allowed.
    """
    if schedule is None:
        for name, value in (("target", target), ("guard", guard)):
            if value is not None:
                raise ValueError(f"{who}: {name} must come with a schedule, got {shown(value)}")
        return None
    wrong = [name for name, value in zip(CONFIGS, given, strict=True) if value is not None]
    wrong += [name for name in options if name not in BESIDE]
    if wrong:
        raise ValueError(
            f"{who}: {', '.join(wrong)} must not be given with a schedule, which sets the steps "
            f"and the predictor; leave out one of them. Beside it: {', '.join(BESIDE)}"
        )
    found = Schedule.of(schedule, f"{who}: schedule").settings(target, guard, who)
    for modifier in found:
        assert modifier.cache_config is not None
        modifier.cache_config.update(**options)
    return PerTransformer(found)


def check_scheduled(
    who: str, schedule: Source | None, setups: Sequence[Setup], pipe: object
) -> None:
    """Raise a ValueError if a schedule is of other transformers or of another scheduler."""
    if schedule is not None:
        names = [type(setup.module).__name__ for setup in setups]
        scheduler = getattr(pipe, "scheduler", None)
        Schedule.of(schedule, f"{who}: schedule").check_model(names, scheduler, who)


Modifiers = ParamsModifier | Sequence[ParamsModifier] | None


def settings_of(
    who: str,
    schedule: Source | None,
    target: Any,
    guard: float | None,
    configs: tuple[DBCacheConfig | None, CalibratorConfig | None, Modifiers],
    options: dict[str, Any],
) -> tuple[StackSettings, Modifiers]:
    """Return what holds for all stacks, and what single ones do differently.

    Arguments and errors are those of `rows_of`.
    """
    cache_config, calibrator_config, modifiers = configs
    check_type(f"{who}: cache_config", cache_config, DBCacheConfig)
    check_type(f"{who}: calibrator_config", calibrator_config, CalibratorConfig)
    rows = rows_of(who, schedule, target, guard, configs, options)
    partial, calibrator = options_of(who, options, cache_config, calibrator_config)
    config = merge(cache_config or DBCacheConfig(), partial)
    settings = StackSettings(config, calibrator or CalibratorConfig())
    if rows is not None and len(rows) == 1:
        return settings.modified(rows[0]), None
    return settings, modifiers if rows is None else rows


def options_of(
    who: str,
    options: dict[str, Any],
    cache_config: DBCacheConfig | None,
    calibrator_config: CalibratorConfig | None,
) -> tuple[DBCacheConfig, CalibratorConfig | None]:
    """Return flat options as a partial config, and a copy of the predictor."""
    fields, calibrator = split_options(who, options, calibrator_config)
    return partial_config(who, fields, cache_config), copy.copy(calibrator)


def changes_of(
    who: str,
    handles: Sequence[CachedTransformer],
    cache_config: DBCacheConfig | None,
    calibrator_config: CalibratorConfig | None,
    options: dict[str, Any],
) -> ParamsModifier:
    """Return what is to differ from the settings in force."""
    check_type(f"{who}: cache_config", cache_config, DBCacheConfig)
    check_type(f"{who}: calibrator_config", calibrator_config, CalibratorConfig)
    base = cache_config or handles[0].setup.config
    partial, calibrator = options_of(who, options, base, calibrator_config)
    if cache_config is not None:
        partial = cache_config.changed(**partial.given)
    return ParamsModifier(cache_config=partial, calibrator_config=calibrator)
