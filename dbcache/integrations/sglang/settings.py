"""The engine's config and dbcache's own options, as options of `dbcache.enable`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbcache.config.files import load_configs, partial_config, split_options
from dbcache.config.options import shown
from dbcache.config.reading import parse_json, read

CHOSEN = "SGLANG_DBCACHE"
"""Environment variable: dbcache serves in place of cache-dit."""

OPTIONS = "SGLANG_DBCACHE_OPTIONS"
"""Environment variable: dbcache's own options, as a JSON object or the path of a file."""

STEPS = "num_inference_steps"

OWN = "_dbcache_options"
"""Attribute of the engine's config: the options of a request that are dbcache's own."""

TAKEN = (
    "Fn_compute_blocks",
    "Bn_compute_blocks",
    "max_warmup_steps",
    "residual_diff_threshold",
    "max_continuous_cached_steps",
    STEPS,
    "steps_computation_mask",
    "steps_computation_policy",
)
"""Fields of the engine's config that go by the same name here."""

PREDICTORS = {
    "taylorseer": ("taylorseer_order",),
    "dmd": ("dmd_history", "dmd_rank", "dmd_ridge", "dmd_svd_precision"),
}
"""Those that the engine's config can switch on, with their options, under the same names."""


def is_chosen() -> bool:
    """Whether the environment says that dbcache serves."""
    return os.environ.get(CHOSEN, "").strip().lower() in ("1", "true", "yes", "on")


def options_of(config: Any, **more: Any) -> dict[str, Any]:
    """Return the arguments of `dbcache.enable` for the engine's `CacheDitConfig`.

    On top of it come the environment's own options, then those of the request. A predictor among
    these replaces that of the engine's config. `more` are options below all of these. The steps of
    a request are those that the engine tells.
    """
    own = options_of_environment() | getattr(config, OWN, {})
    options = {name: getattr(config, name) for name in TAKEN if getattr(config, name) is not None}
    if split_options(OPTIONS, own)[1] is None:
        for name, fields in PREDICTORS.items():
            if getattr(config, f"enable_{name}"):
                switches = {f"enable_{name}": True, f"enable_encoder_{name}": True}
                options |= switches | {field: getattr(config, field) for field in fields}
    told = {} if config.num_inference_steps is None else {STEPS: config.num_inference_steps}
    configs = load_configs(more | options | own | told)
    # the engine passes all of its options: those at its defaults were not chosen
    plain, cache = type(config)(), configs["cache_config"]
    cache.__dict__["_given"] = frozenset(
        name
        for name, value in cache.given.items()
        if name in own or name == "max_warmup_steps" or getattr(plain, name, ...) != value
    )
    return configs


def options_of_environment() -> dict[str, Any]:
    """Return the options in ``SGLANG_DBCACHE_OPTIONS``: a JSON object, or the path of a file.

    Raises:
        TypeError, ValueError: an unknown option, a value that is not allowed, or what cannot be
            read.
    """
    text = os.environ.get(OPTIONS, "").strip()
    if not text:
        return {}
    try:
        if text.startswith(("{", "[")):
            options = parse_json(text)
        else:
            options = read(OPTIONS, Path(text), yaml=not text.endswith(".json"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{OPTIONS}: must be a JSON object or the path of a .json or .yaml file, got "
            f"{shown(text)}: {error}"
        ) from error
    if not isinstance(options, dict):
        raise TypeError(f"{OPTIONS}: must be an object of options, got {shown(options)}")
    check(OPTIONS, options)
    return options


def check(who: str, options: Mapping[str, Any]) -> None:
    """Raise a TypeError or ValueError unless all are options of dbcache."""
    partial_config(who, split_options(who, options)[0])


def split(options: Mapping[str, Any], keys: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that are among `keys`, and the others."""
    theirs = {name: value for name, value in options.items() if name in keys}
    return theirs, {name: value for name, value in options.items() if name not in keys}
