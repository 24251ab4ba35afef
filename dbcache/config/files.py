"""Settings from files and dictionaries: `load_configs`, and the flat names that it shares with
`enable`. The keys are cache-dit's and those that serving engines pass on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbcache.config.attention import backend_name
from dbcache.config.cache import DBCacheConfig
from dbcache.config.flat import ALIASES, PREDICTION, by_field, split
from dbcache.config.options import check_method, reject_unknown, shown
from dbcache.config.parallelism import ParallelismConfig
from dbcache.config.predictors import CalibratorConfig
from dbcache.config.prune import DBPruneConfig
from dbcache.config.quantize import QuantizeConfig
from dbcache.config.reading import read
from dbcache.config.renamed import also_called

SECTION = "cache_config"
PARALLELISM = "parallelism_config"
ATTENTION = "attention_backend"
QUANTIZATION = "quantize_config"
SECTIONS = (SECTION, PARALLELISM, QUANTIZATION)
_FLAT = (*DBPruneConfig.names(), *ALIASES, *PREDICTION)
_NONE = {name for name, value in DBPruneConfig().as_dict().items() if value is None}
_SIZES = {axis: f"{axis}_size" for axis in ("ulysses", "ring", "tp")}
_METHODS: dict[str, type[DBCacheConfig]] = {"DBCache": DBCacheConfig, "DBPrune": DBPruneConfig}

Source = str | os.PathLike[str] | Mapping[str, Any]
"""A .yaml, .yml or .json file, or what it would hold."""


@also_called("path_or_dict")
def load_configs(source: Source, return_dict: bool = True) -> Any:
    """Return the keyword arguments of `enable`: ``enable(pipe, **load_configs("cache.yaml"))``.

    Args:
        source: a .yaml, .yml or .json file, or a mapping. Its options lie in a section
            `cache_config`, or directly in it: the fields of `DBCacheConfig` (with
            ``cache_type="DBPrune"`` those of `DBPruneConfig`), `scm_steps_mask_policy` and
            `scm_steps_policy` for the mask and its policy, and for one of taylorseer, hermite,
            foca, dmd, spectrum and custom `enable_foca`, `enable_encoder_foca`, its fields as in
            `foca_horizon`, and `calibrator_cache_type`. A section `parallelism_config` beside it
            has the fields of `ParallelismConfig`, where `ulysses`, `ring` and `tp` stand for the
            sizes, too, and a section `quantize_config` those of `QuantizeConfig`.
        return_dict: False: a tuple of five, in the order of `enable`, None for what is not there.

    Returns:
        `cache_config`, which holds the options that were given, and `calibrator_config`, None
        where nothing was said of it; `parallelism_config` and `quantize_config` where there
        are those sections, and `attention_backend` where that is given beside them.

    Raises:
        TypeError: an unknown option (the error names the nearest one) or a wrong type.
        ValueError: a value that is not allowed, a section that is not supported, or a file that
            cannot be parsed. OSError: it cannot be read.
        ImportError: PyYAML is needed and missing.
    """
    configs = _load("load_configs", source)
    if return_dict:
        return configs
    names = (SECTION, "calibrator_config", PARALLELISM, ATTENTION, QUANTIZATION)
    return tuple(configs.get(name) for name in names)


@also_called("path_or_dict")
def load_cache_config(source: Source) -> tuple[DBCacheConfig, CalibratorConfig | None]:
    """Return the first two of what `load_configs` does.

    Raises:
        TypeError, ValueError, OSError, ImportError: as `load_configs`.
    """
    configs = _load("load_cache_config", source)
    return configs[SECTION], configs["calibrator_config"]


@also_called("path_or_dict")
def load_parallelism_config(source: Source) -> ParallelismConfig | None:
    """Return the `parallelism_config` of what `load_configs` does, None without that section.

    Raises:
        TypeError, ValueError, OSError, ImportError: as `load_configs`.
    """
    return _load("load_parallelism_config", source).get(PARALLELISM)


@also_called("path_or_dict")
def load_attn_backend_config(source: Source) -> str | None:
    """Return the `attention_backend` of what `load_configs` does, None where it is not given.

    Raises:
        TypeError, ValueError, OSError, ImportError: as `load_configs`.
    """
    return _load("load_attn_backend_config", source).get(ATTENTION)


@also_called("path_or_dict")
def load_quantize_config(source: Source) -> QuantizeConfig | None:
    """Return the `quantize_config` of what `load_configs` does, None without that section.

    Raises:
        TypeError, ValueError, OSError, ImportError: as `load_configs`.
    """
    return _load("load_quantize_config", source).get(QUANTIZATION)


def _load(who: str, source: Source) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return _configs(who, source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{who}: a path or a mapping must be given, got {shown(source)}")
    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{who}: the file must be .yaml, .yml or .json, got {str(path)!r}")
    given = read(who, path, yaml=path.suffix != ".json")
    try:
        return _configs(who, given)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{who}: in {path}: {str(error).removeprefix(f'{who}: ')}") from error


def _configs(who: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise TypeError(f"{who}: a mapping of options must be given, got {shown(given)}")
    attention = backend_name(f"{who}: {ATTENTION}", given.get(ATTENTION))
    sections = {name: options for name, options in given.items() if name != ATTENTION}
    if sections.keys().isdisjoint(SECTIONS):
        sections = {SECTION: sections}
    reject_unknown(who, sections, (*SECTIONS, ATTENTION))
    for name, options in sections.items():
        if not isinstance(options, Mapping):
            raise TypeError(f"{who}: {name} must be a mapping of options, got {shown(options)}")
    fields, predictor = split_options(who, sections.get(SECTION, {}))
    configs: dict[str, Any] = {SECTION: partial_config(who, fields), "calibrator_config": predictor}
    if PARALLELISM in sections:
        sizes = by_field(who, sections[PARALLELISM], _SIZES)
        reject_unknown("ParallelismConfig", sizes, ParallelismConfig.names())
        configs[PARALLELISM] = ParallelismConfig(**sizes)
    if QUANTIZATION in sections:
        configs[QUANTIZATION] = QuantizeConfig(**sections[QUANTIZATION])
    if attention is not None:
        configs[ATTENTION] = attention
    return configs


def partial_config(
    who: str, options: Mapping[str, Any], base: DBCacheConfig | None = None
) -> DBCacheConfig:
    """Return `options` as a config of the method that they name, or else of that of `base`.

    Raises:
        TypeError, ValueError: an option that the method does not have, or a value that is not
            allowed.
    """
    method = options.get("cache_type", base.cache_type if base else "DBCache")
    config = _METHODS[check_method(f"{who}: cache_type", method, tuple(_METHODS))]
    for name in options:
        if name not in config.names():
            raise TypeError(
                f"{who}: {name} is an option of DBPrune, got it for {config().cache_type}; set "
                f"cache_type='DBPrune' or pass a DBPruneConfig"
            )
    return config(**options)


def split_options(
    who: str, given: Mapping[str, Any], config: CalibratorConfig | None = None
) -> tuple[dict[str, Any], CalibratorConfig | None]:
    """Return the fields of the cache's config among flat options, and the predictor, as `split`.

    An option of None counts as not given, unless None is its default: then it takes back another.

    Raises:
        TypeError: an unknown option. ValueError: as `split`.
    """
    reject_unknown(who, given, _FLAT)
    given = {name: value for name, value in given.items() if value is not None or name in _NONE}
    return split(who, given, config)
