"""Settings from files and dictionaries: `load_configs`, and the flat names that it shares with
`enable`. The keys are cache-dit's and those that serving engines pass on.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbcache.calibrators import CalibratorConfig, TaylorSeerCalibratorConfig
from dbcache.config import DBCacheConfig
from dbcache.options import check_choice, reject_unknown
from dbcache.parallelism_config import ParallelismConfig
from dbcache.prune_config import DBPruneConfig

SECTION = "cache_config"
PARALLELISM = "parallelism_config"
_OTHER_SECTIONS = ("attention_backend", "quantize_config")
_ALIASES = {
    "scm_steps_mask_policy": "steps_computation_mask",
    "scm_steps_policy": "steps_computation_policy",
}
_TAYLORSEER = {
    "enable_taylorseer": "enable_calibrator",
    "enable_encoder_taylorseer": "enable_encoder_calibrator",
    "taylorseer_cache_type": "calibrator_cache_type",
    "taylorseer_order": "taylorseer_order",
}
_SWITCHES = ("enable_taylorseer", "enable_encoder_taylorseer")
_FLAT = (*(field.name for field in dataclasses.fields(DBPruneConfig)), *_ALIASES, *_TAYLORSEER)
_METHODS: dict[str, type[DBCacheConfig]] = {"DBCache": DBCacheConfig, "DBPrune": DBPruneConfig}


def load_configs(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `enable`: ``enable(pipe, **load_configs("cache.yaml"))``.

    Args:
        source: a .yaml, .yml or .json file, or a mapping. Its options lie in a section
            `cache_config`, or directly in it: the fields of `DBCacheConfig` (with
            ``cache_type="DBPrune"`` those of `DBPruneConfig`), `enable_taylorseer`,
            `enable_encoder_taylorseer`, `taylorseer_order`, `taylorseer_cache_type`, and
            `scm_steps_mask_policy` and `scm_steps_policy` for the mask and its policy. A section
            `parallelism_config` beside it has the fields of `ParallelismConfig`, where `ulysses`,
            `ring` and `tp` stand for the sizes, too.

    Returns:
        `cache_config`, which holds the options that were given, and `calibrator_config`, None
        where nothing was said of it; `parallelism_config` where there is that section.

    Raises:
        TypeError: an unknown option (the error names the nearest one) or a wrong type.
        ValueError: a value that is not allowed, a section that is not supported, or a file that
            cannot be parsed. OSError: it cannot be read.
        ImportError: PyYAML is needed and missing.
    """
    given = source if isinstance(source, Mapping) else _read(source)
    if not isinstance(given, Mapping):
        raise TypeError(f"load_configs: a mapping of options must be given, got {given!r}")
    unsupported = [name for name in _OTHER_SECTIONS if name in given]
    if unsupported:
        raise ValueError(
            f"load_configs: the section must be {SECTION!r} or {PARALLELISM!r}, got "
            f"{unsupported[0]!r}; remove it"
        )
    sections = [name for name in (SECTION, PARALLELISM) if name in given]
    if not sections:
        return _cache_options(given)
    reject_unknown("load_configs", given, (SECTION, PARALLELISM))
    for name in sections:
        if not isinstance(given[name], Mapping):
            raise TypeError(
                f"load_configs: {name} must be a mapping of options, got {given[name]!r}"
            )
    configs = _cache_options(given.get(SECTION, {}))
    if PARALLELISM in given:
        configs[PARALLELISM] = _parallelism(given[PARALLELISM])
    return configs


def _cache_options(given: Mapping[str, Any]) -> dict[str, Any]:
    options, calibrator = split_options("load_configs", given)
    return {
        "cache_config": partial_config("load_configs", options),
        "calibrator_config": calibrator,
    }


def partial_config(
    who: str, options: Mapping[str, Any], base: DBCacheConfig | None = None
) -> DBCacheConfig:
    """Return `options` as a config of the method that they name, or else of that of `base`.

    Raises:
        TypeError, ValueError: an option that the method does not have, or a value that is not
            allowed.
    """
    base = DBCacheConfig() if base is None else base
    method = options.get("cache_type", base.cache_type)
    check_choice(f"{who}: cache_type", method, tuple(_METHODS))
    config = _METHODS[method]
    known = [field.name for field in dataclasses.fields(config)]
    for name in options:
        if name not in known:
            raise TypeError(
                f"{who}: {name} is an option of DBPrune, got it for {config().cache_type}; set "
                f"cache_type='DBPrune' or pass a DBPruneConfig"
            )
    return config(**options)


def _parallelism(given: Mapping[str, Any]) -> ParallelismConfig:
    """Return the config of a section, in which the sizes may have short names."""
    options = dict(given)
    for short in ("ulysses", "ring", "tp"):
        if short in options:
            name = f"{short}_size"
            if name in options:
                raise ValueError(
                    f"load_configs: {short} and {name} must not both be given; remove one"
                )
            options[name] = options.pop(short)
    return ParallelismConfig(**options)


def split_options(
    who: str, given: Mapping[str, Any]
) -> tuple[dict[str, Any], CalibratorConfig | None]:
    """Return the fields of the cache's config among flat options, and the predictor they name.

    The predictor is None where nothing was said of it, and the base config, which reuses the last
    residual, where TaylorSeer was switched off.

    Raises:
        TypeError: an unknown option. ValueError: one that contradicts another or lacks it.
    """
    reject_unknown(who, given, _FLAT)
    options = {name: given[name] for name in given if name not in (*_ALIASES, *_TAYLORSEER)}
    for alias, name in _ALIASES.items():
        if alias in given:
            if name in given:
                raise ValueError(f"{who}: {alias} and {name} must not both be given; remove one")
            options[name] = given[alias]
    taylorseer = {name: given[name] for name in given if name in _TAYLORSEER}
    if not taylorseer:
        return options, None
    if not any(name in taylorseer for name in _SWITCHES):
        raise ValueError(
            f"{who}: {_SWITCHES[0]} must be given with {', '.join(taylorseer)}, got neither it nor "
            f"{_SWITCHES[1]}; add {_SWITCHES[0]}=True"
        )
    fields = dict.fromkeys(_SWITCHES, False) | taylorseer
    calibrator = TaylorSeerCalibratorConfig(**{_TAYLORSEER[n]: v for n, v in fields.items()})
    is_on = calibrator.enable_calibrator or calibrator.enable_encoder_calibrator
    return options, calibrator if is_on else CalibratorConfig()


def _read(source: str | os.PathLike[str]) -> Any:
    """Return what a YAML or JSON file holds."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"load_configs: a path or a mapping must be given, got {source!r}")
    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"load_configs: the file must be .yaml, .yml or .json, got {str(path)!r}")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"load_configs: {path} must be JSON, got {error}") from error
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            f"load_configs: PyYAML must be installed to read {path.name}: "
            f"pip install 'dbcache[yaml]'; or give a .json file or a dict"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"load_configs: {path} must be YAML, got {error}") from error
