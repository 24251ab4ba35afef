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

from dbcache.config.cache import DBCacheConfig
from dbcache.config.options import check_choice, reject_unknown
from dbcache.config.parallelism import ParallelismConfig
from dbcache.config.predictors import PREDICTORS, CalibratorConfig
from dbcache.config.prune import DBPruneConfig

SECTION = "cache_config"
PARALLELISM = "parallelism_config"
_OTHER_SECTIONS = ("attention_backend", "quantize_config")
_ALIASES = {
    "scm_steps_mask_policy": "steps_computation_mask",
    "scm_steps_policy": "steps_computation_policy",
    "taylorseer_cache_type": "calibrator_cache_type",
}
_SWITCHES = {
    f"{switch}_{name}": name for name in PREDICTORS for switch in ("enable", "enable_encoder")
}
"""Flat options that switch a predictor on."""

_FIELDS = {
    name: {
        field.metadata.get("flat", field.name): field.name
        for field in dataclasses.fields(config)
        if field.name not in CalibratorConfig.names()
    }
    for name, config in PREDICTORS.items()
}
"""Per predictor the flat names of its own fields."""

_CACHE_TYPE = "calibrator_cache_type"
_PREDICTION = (_CACHE_TYPE, *_SWITCHES, *(flat for fields in _FIELDS.values() for flat in fields))
_FLAT = (*DBPruneConfig.names(), *_ALIASES, *_PREDICTION)
_METHODS: dict[str, type[DBCacheConfig]] = {"DBCache": DBCacheConfig, "DBPrune": DBPruneConfig}


def load_configs(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `enable`: ``enable(pipe, **load_configs("cache.yaml"))``.

    Args:
        source: a .yaml, .yml or .json file, or a mapping. Its options lie in a section
            `cache_config`, or directly in it: the fields of `DBCacheConfig` (with
            ``cache_type="DBPrune"`` those of `DBPruneConfig`), `scm_steps_mask_policy` and
            `scm_steps_policy` for the mask and its policy, and for one of taylorseer, hermite,
            foca, dmd, spectrum and custom `enable_foca`, `enable_encoder_foca`, its fields as in
            `foca_horizon`, and `calibrator_cache_type`. A section `parallelism_config` beside it
            has the fields of `ParallelismConfig`, where `ulysses`, `ring` and `tp` stand for the
            sizes, too.

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
    options, predictor = split_options("load_configs", given)
    config = partial_config("load_configs", options)
    return {SECTION: config, "calibrator_config": predictor}


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
    for name in options:
        if name not in config.names():
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
    residual, where one was switched off.

    Raises:
        TypeError: an unknown option. ValueError: one that contradicts another or lacks it.
    """
    reject_unknown(who, given, _FLAT)
    options = {name: value for name, value in given.items() if name not in _ALIASES}
    for alias, name in _ALIASES.items():
        if alias in given and name in given:
            raise ValueError(f"{who}: {alias} and {name} must not both be given; remove one")
        if alias in given:
            options[name] = given[alias]
    prediction = {name: options.pop(name) for name in _PREDICTION if name in options}
    return options, _predictor(who, prediction) if prediction else None


def _predictor(who: str, given: dict[str, Any]) -> CalibratorConfig:
    """Return the predictor that flat options name."""
    switches = [option for option in given if option in _SWITCHES]
    named = dict.fromkeys(_SWITCHES[switch] for switch in switches)
    on = dict.fromkeys(_SWITCHES[switch] for switch in switches if given[switch] is not False)
    if len(on) > 1:
        raise ValueError(f"{who}: one predictor must be switched on, got {', '.join(on)}")
    if not named:
        first = next((name for name, fields in _FIELDS.items() if set(fields) & set(given)), None)
        name = first or next(iter(PREDICTORS))
        raise ValueError(
            f"{who}: enable_{name} must be given with {', '.join(given)}, got neither it nor "
            f"enable_encoder_{name}; add enable_{name}=True"
        )
    name = next(iter(on or named))
    if not on and name == "custom":
        return CalibratorConfig()
    # engines pass on all fields of a predictor that is switched off
    allowed = {flat for each in named for flat in _FIELDS[each]}
    stray = [flat for flat in given if flat not in (*allowed, *_SWITCHES, _CACHE_TYPE)]
    if stray:
        raise ValueError(f"{who}: {stray[0]} must not be given with enable_{name}, got both")
    fields = {**_FIELDS[name], _CACHE_TYPE: _CACHE_TYPE}
    values = {field: given[flat] for flat, field in fields.items() if flat in given}
    hidden = given.get(f"enable_{name}", False)
    # cache-dit's DMD takes the encoder states along unless it is told otherwise, the others do not
    encoder = given.get(f"enable_encoder_{name}", hidden if name == "dmd" else False)
    predictor = PREDICTORS[name](
        enable_calibrator=hidden, enable_encoder_calibrator=encoder, **values
    )
    is_on = predictor.enable_calibrator or predictor.enable_encoder_calibrator
    return predictor if is_on else CalibratorConfig()


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
