"""Predictors by flat options, as in ``enable_taylorseer=True, taylorseer_order=2``.

The names are cache-dit's and those that serving engines pass on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dbcache.config.predictors import PREDICTORS, CalibratorConfig

ALIASES = {
    "scm_steps_mask_policy": "steps_computation_mask",
    "scm_steps_policy": "steps_computation_policy",
    "taylorseer_cache_type": "calibrator_cache_type",
}
"""Other names of flat options."""

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
PREDICTION = (_CACHE_TYPE, *_SWITCHES, *(flat for fields in _FIELDS.values() for flat in fields))
"""All flat options that concern the prediction."""


def by_field(who: str, given: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return options under the names of fields, of which some have an alias.

    Raises:
        ValueError: a field is given by both names.
    """
    for alias, name in aliases.items():
        if alias in given and name in given:
            raise ValueError(f"{who}: {alias} and {name} must not both be given; remove one")
    return {aliases.get(name, name): value for name, value in given.items()}


def split(
    who: str, given: Mapping[str, Any], config: CalibratorConfig | None = None
) -> tuple[dict[str, Any], CalibratorConfig | None]:
    """Return what is left of flat options under the names of fields, and the predictor.

    That is `config` or what the options name: None where nothing was said of it, and the base
    config, which reuses the last residual, where one was switched off.

    Raises:
        ValueError: an option that contradicts another or lacks it, or the predictor twice.
    """
    options = by_field(who, given, ALIASES)
    prediction = {name: options.pop(name) for name in PREDICTION if name in options}
    predictor = _predictor(who, prediction) if prediction else config
    if prediction and config is not None:
        raise ValueError(
            f"{who}: calibrator_config must not be given together with a predictor's options, got "
            f"both; set them in the config"
        )
    return options, predictor


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
