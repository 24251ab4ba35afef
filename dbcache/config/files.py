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
from dbcache.config.predictors import (
    CalibratorConfig,
    CustomCalibratorConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    SpectrumCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from dbcache.config.prune import DBPruneConfig

SECTION = "cache_config"
PARALLELISM = "parallelism_config"
_OTHER_SECTIONS = ("attention_backend", "quantize_config")
_ALIASES = {
    "scm_steps_mask_policy": "steps_computation_mask",
    "scm_steps_policy": "steps_computation_policy",
}
_CALIBRATORS: dict[str, tuple[type[CalibratorConfig], dict[str, str]]] = {
    "taylorseer": (
        TaylorSeerCalibratorConfig,
        {"taylorseer_order": "taylorseer_order", "taylorseer_exact": "exact"}
        | {"taylorseer_cache_type": "calibrator_cache_type"},
    ),
    "hermite": (
        HermiteCalibratorConfig,
        {"hermite_order": "hermite_order", "hermite_sigma": "sigma"},
    ),
    "foca": (FoCaCalibratorConfig, {"foca_horizon": "foca_horizon"}),
    "dmd": (
        DMDCalibratorConfig,
        {f"dmd_{name}": f"dmd_{name}" for name in ("history", "ridge", "rank", "svd_precision")},
    ),
    "spectrum": (
        SpectrumCalibratorConfig,
        {f"spectrum_{name}": f"spectrum_{name}" for name in ("order", "window", "ridge", "blend")},
    ),
    "custom": (CustomCalibratorConfig, {"predictor_name": "predictor_name"}),
}
"""Per predictor its config, and flat names of its fields besides the two switches."""

_CACHE_TYPE = "calibrator_cache_type"
_PREDICTION = (
    _CACHE_TYPE,
    *(f"{switch}_{name}" for name in _CALIBRATORS for switch in ("enable", "enable_encoder")),
    *(flat for _, fields in _CALIBRATORS.values() for flat in fields),
)
_FLAT = (*(field.name for field in dataclasses.fields(DBPruneConfig)), *_ALIASES, *_PREDICTION)
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
    residual, where one was switched off.

    Raises:
        TypeError: an unknown option. ValueError: one that contradicts another or lacks it.
    """
    reject_unknown(who, given, _FLAT)
    options = {name: given[name] for name in given if name not in (*_ALIASES, *_PREDICTION)}
    for alias, name in _ALIASES.items():
        if alias in given:
            if name in given:
                raise ValueError(f"{who}: {alias} and {name} must not both be given; remove one")
            options[name] = given[alias]
    prediction = {name: given[name] for name in given if name in _PREDICTION}
    return options, _calibrator(who, prediction) if prediction else None


def _calibrator(who: str, given: dict[str, Any]) -> CalibratorConfig:
    """Return the predictor that flat options name."""
    switches = {
        switch: name
        for name in _CALIBRATORS
        for switch in (f"enable_{name}", f"enable_encoder_{name}")
    }
    named = dict.fromkeys(switches[switch] for switch in given if switch in switches)
    on = dict.fromkeys(switches[s] for s in given if s in switches and given[s] is not False)
    if len(on) > 1:
        raise ValueError(f"{who}: one predictor must be switched on, got {', '.join(on)}")
    if not named:
        first = next(
            (n for n, (_, fields) in _CALIBRATORS.items() if set(fields) & set(given)), None
        )
        switch = f"enable_{first or next(iter(_CALIBRATORS))}"
        raise ValueError(
            f"{who}: {switch} must be given with {', '.join(given)}, got neither it nor "
            f"{switch.replace('enable', 'enable_encoder')}; add {switch}=True"
        )
    name = next(iter(on or named))
    config, fields = _CALIBRATORS[name]
    if not on and name == "custom":
        return CalibratorConfig()
    # engines pass on all fields of a predictor that is switched off
    allowed = [flat for each in named for flat in _CALIBRATORS[each][1]]
    stray = [flat for flat in given if flat not in (*allowed, *switches, _CACHE_TYPE)]
    if stray:
        raise ValueError(f"{who}: {stray[0]} must not be given with enable_{name}, got both")
    values = {field: given[flat] for flat, field in fields.items() if flat in given}
    cache_type = given.get(_CACHE_TYPE, values.get(_CACHE_TYPE))
    if cache_type is not None and values.setdefault(_CACHE_TYPE, cache_type) != cache_type:
        raise ValueError(f"{who}: {_CACHE_TYPE} must be given once, got two values")
    hidden = given.get(f"enable_{name}", False)
    # cache-dit's DMD takes the encoder states along unless it is told otherwise, the others do not
    encoder = given.get(f"enable_encoder_{name}", hidden if name == "dmd" else False)
    calibrator = config(enable_calibrator=hidden, enable_encoder_calibrator=encoder, **values)
    is_on = calibrator.enable_calibrator or calibrator.enable_encoder_calibrator
    return calibrator if is_on else CalibratorConfig()


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
