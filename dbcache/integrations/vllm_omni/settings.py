"""The engine's cache config as options of `dbcache.enable`."""

from __future__ import annotations

import dataclasses
from typing import Any

import dbcache
from dbcache.config.files import split_options
from dbcache.config.options import shown

TAKEN = (
    "Fn_compute_blocks",
    "Bn_compute_blocks",
    "max_warmup_steps",
    "max_cached_steps",
    "residual_diff_threshold",
    "max_continuous_cached_steps",
    "scm_steps_policy",
    "num_inference_steps",
    "force_refresh_step_hint",
    "force_refresh_step_policy",
)
"""Fields of the engine's config that go by the same name here."""

TAYLORSEER = ("enable_taylorseer", "taylorseer_order")
MASK = "scm_steps_mask_policy"
OF_MASK = ("steps_computation_mask", "steps_computation_policy")

OF_ENABLE = ("cuda_graph", "max_requests")
"""Options that are arguments of `enable`, not of the cache's config."""


def as_config(config: Any) -> Any:
    """Return the engine's config of what it hands over: that, a dictionary, or None.

    Raises:
        TypeError: it is something else.
    """
    from vllm_omni.diffusion.data import DiffusionCacheConfig

    if config is None or isinstance(config, dict):
        return DiffusionCacheConfig.from_dict(config or {})
    if not isinstance(config, DiffusionCacheConfig):
        raise TypeError(
            f"cache_config must be a dictionary of options or None, got {shown(config)}"
        )
    return config


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `dbcache.enable` is called with.

    Attributes:
        options: its keyword arguments.
        masked: options of a named mask, which takes effect once the steps of a request are known.
    """

    options: dict[str, Any]
    masked: dict[str, Any]

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Return the settings of the engine's config.

        Its own options have its names and defaults. All others are those of `dbcache.enable`.

        Raises:
            TypeError: an unknown option, or one of another cache backend. ValueError: a value that
                is not allowed.
        """
        _reject_others(config)
        extra = dict(config._extra_params)
        given = {name: getattr(config, name) for name in TAKEN}
        if config.enable_taylorseer:
            # as cache-dit's TaylorSeer does where it is given as a config
            given |= {name: getattr(config, name) for name in TAYLORSEER}
            given["enable_encoder_taylorseer"] = True
        given |= {name: value for name, value in extra.items() if name not in OF_ENABLE}
        if config.scm_steps_mask_policy is not None:
            given[MASK] = config.scm_steps_mask_policy
        split_options("cache_config", given)  # before load_configs, for the name in its errors
        configs = dbcache.load_configs(given)
        values, masked = dict(configs["cache_config"].given), {}
        if MASK in given:
            masked = {name: values.pop(name) for name in OF_MASK}
        own = configs["cache_config"] = type(configs["cache_config"])(**values)
        # the engine passes all of its options: those at its defaults were not chosen
        plain = vars(type(config)())
        own.__dict__["_given"] = frozenset(
            name
            for name, value in values.items()
            if name in extra or name == "max_warmup_steps" or plain.get(name, ...) != value
        )
        options = configs | {name: extra[name] for name in OF_ENABLE if name in extra}
        return cls(options, masked)


def _reject_others(config: Any) -> None:
    """Raise a TypeError for an option that would have no effect: one of another backend."""
    plain = type(config)()
    for field in dataclasses.fields(config):
        known = field.name in (*TAKEN, *TAYLORSEER, MASK) or field.name.startswith("_")
        value = getattr(config, field.name)
        if not known and value != getattr(plain, field.name):
            raise TypeError(
                f"cache_config: {field.name} is an option of another cache backend, got "
                f"{shown(value)} for 'dbcache'; leave it out"
            )
