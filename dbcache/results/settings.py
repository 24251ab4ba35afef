"""Settings as Python to copy."""

from __future__ import annotations

from collections.abc import Sequence

from dbcache.config.cache import DBCacheConfig, ParamsModifier
from dbcache.config.options import Options
from dbcache.config.predictors import CalibratorConfig


def python_of(
    cache: DBCacheConfig,
    predictor: CalibratorConfig,
    modifiers: Sequence[ParamsModifier | None] = (),
) -> str:
    """Return the call of `enable` that has these settings; of a schedule, that there was one."""
    parts = [cache, *(one.cache_config for one in modifiers if one is not None)]
    if any(part is not None and part.policy == "schedule" for part in parts):
        return 'dbcache.enable(pipe, schedule="...", target="...")  # as written by dbcache.tune'
    lines = ["pipe", call_of(cache)]
    if type(predictor) is not CalibratorConfig:
        lines.append(call_of(predictor))
    if any(modifiers):
        lines.append(f"params_modifiers=[{', '.join(map(_modifier, modifiers))}]")
    return "dbcache.enable(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def call_of(options: Options) -> str:
    """Return the constructor of a config with the fields that were given."""
    given = ", ".join(f"{name}={_value(value)}" for name, value in options.given.items())
    return f"dbcache.{type(options).__name__}({given})"


def _value(value: object) -> str:
    return repr(value) if not hasattr(value, "__fspath__") else repr(str(value))


def _modifier(modifier: ParamsModifier | None) -> str:
    if modifier is None:
        return "None"
    parts = [("cache_config", modifier.cache_config)]
    parts += [("calibrator_config", modifier.calibrator_config)]  # type: ignore[list-item]
    given = ", ".join(f"{name}={call_of(value)}" for name, value in parts if value is not None)
    return f"dbcache.ParamsModifier({given})"
