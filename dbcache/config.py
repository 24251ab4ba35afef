"""What the user may set: when to cache (`DBCacheConfig`) and how to predict (`*CalibratorConfig`).

Names and defaults are cache-dit's, so that its users can switch. A config knows which of its
fields were given, so that a partial one changes only those: see `ParamsModifier`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dbcache.schedule import check_mask

UNLIMITED = -1
HIGHEST_ORDER = 4


def reject_unknown(who: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError that names the nearest known option, if one of `names` is not `known`."""
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"{who}: unknown option {name!r}; {hint}known: {', '.join(known)}")


def check_int(who: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{who} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{who} must be an integer {allowed}, got {value!r}")


def check_number(who: str, value: Any, *, positive: bool = False) -> None:
    """Raise unless `value` is a finite number, at least 0 or (`positive`) above it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{who} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{who} must be a number {'>' if positive else '>='} 0, got {value!r}")


def check_flag(who: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{who} must be True or False, got {value!r}")


def check_choice(who: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{who} must be one of {allowed}, got {value!r}")


class Options:
    """Base of the configs: remembers which fields were given, checks names and values."""

    _given: frozenset[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError(f"{cls.__name__}: options are given by name, got {args!r}")
        reject_unknown(cls.__name__, kwargs, [f.name for f in dataclasses.fields(cls)])  # type: ignore[arg-type]
        self = super().__new__(cls)
        self._given = frozenset(kwargs)
        return self

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise if a field has a value that is not allowed."""

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were set, by name or by `update`, with their values."""
        return {name: getattr(self, name) for name in sorted(self._given)}

    def update(self, **options: Any) -> Any:
        """Set `options` in place and return self; None leaves a field as it is.

        Raises:
            TypeError: an option that does not exist.
            ValueError: a value that is not allowed; nothing is changed then.
        """
        names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        reject_unknown(type(self).__name__, options, names)
        options = {name: value for name, value in options.items() if value is not None}
        merged = type(self)(**{**self.as_dict(), **options})
        for name in names:
            setattr(self, name, getattr(merged, name))
        self._given = self._given | frozenset(options)
        return self

    def reset(self, **options: Any) -> Any:
        """Forget everything that was set, then set `options`; return self.

        The result is partial: where it modifies another config, only `options` count.
        """
        fresh = type(self)(**options)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            setattr(self, field.name, getattr(fresh, field.name))
        self._given = fresh._given
        return self

    empty = reset

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


_LOWEST = {
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "max_warmup_steps": 0,
    "warmup_interval": 1,
    "max_cached_steps": UNLIMITED,
    "max_continuous_cached_steps": UNLIMITED,
}
_CHOICES = {
    "steps_computation_policy": ("dynamic", "static"),
    "force_refresh_step_policy": ("once", "repeat"),
    "batch_reduce": ("mean", "max"),
    "cache_dtype": ("model", "float32", "fp8"),
    "cache_type": ("DBCache",),
}


@dataclass(kw_only=True)
class DBCacheConfig(Options):
    """When a step is cached.

    Raises:
        TypeError: an unknown option (the error names the nearest one).
        ValueError: a value outside its range.
    """

    Fn_compute_blocks: int = 8
    """First n blocks, always run: the probe whose residual is compared. At least 1."""

    Bn_compute_blocks: int = 0
    """Last n blocks, always run."""

    residual_diff_threshold: float = 0.08
    """A step is cached if the relative L1 change of the probe residual is below this.
    0 never caches, 1 or more always (within the limits)."""

    batch_reduce: Literal["mean", "max"] = "mean"
    """The change of a batch: "mean" of the batch as a whole, or "max", that of its worst sample."""

    important_condition_threshold: float = 0.0
    """Above 0: compare only the tokens whose own relative L1 change is above this, if there are
    any. 0: all tokens."""

    max_accumulated_residual_diff_threshold: float | None = None
    """A full step is due once the diffs since the last full step sum up to this. None: no limit."""

    max_warmup_steps: int = 8
    """Steps ``0, warmup_interval, 2 * warmup_interval, ... < max_warmup_steps`` are full."""

    warmup_interval: int = 1
    """Distance of the full steps in the warm-up; those between them are decided by the diff."""

    max_cached_steps: int = UNLIMITED
    """Largest number of cached steps per request and lane; -1: no limit, 0: never cache."""

    max_continuous_cached_steps: int = UNLIMITED
    """Largest number of cached steps in a row; -1: no limit, 0: never cache."""

    enable_separate_cfg: bool | None = None
    """Calls alternate between two guidance branches (even, odd). None: as the model's row says.
    Not needed where the pipeline names its calls with `cache_context`."""

    cfg_compute_first: bool = False
    """With alternating calls: the unconditional branch comes first."""

    cfg_diff_compute_separate: bool = True
    """False: the second branch of a step takes the diff of the first."""

    num_inference_steps: int | None = None
    """Steps per request. A transformer that is called without its pipeline starts a new request
    after so many; a pipeline call always starts one."""

    steps_computation_mask: list[int] | None = None
    """One entry per step: 1 full, 0 cached as `steps_computation_policy` says."""

    steps_computation_policy: Literal["dynamic", "static"] = "dynamic"
    """What a 0 in the mask means: "dynamic" asks the diff, "static" caches without asking."""

    force_refresh_step_hint: int | None = None
    """Start a new request after this many calls of the transformer (several chunks per call)."""

    force_refresh_step_policy: Literal["once", "repeat"] = "once"
    """Do so once per pipeline call or `refresh_context`, or each time."""

    cache_dtype: Literal["model", "float32", "fp8"] = "model"
    """How the ring stores residuals: in the model's dtype, in float32, or in fp8 (e4m3 with one
    float32 scale per token), which halves the memory of bfloat16."""

    cache_type: Literal["DBCache"] = "DBCache"
    """The method, as serving engines name it."""

    def validate(self) -> None:
        who = type(self).__name__
        for name, low in _LOWEST.items():
            check_int(f"{who}.{name}", getattr(self, name), low)
        for name in ("num_inference_steps", "force_refresh_step_hint"):
            if getattr(self, name) is not None:
                check_int(f"{who}.{name}", getattr(self, name), 1)
        for name in ("residual_diff_threshold", "important_condition_threshold"):
            check_number(f"{who}.{name}", getattr(self, name))
        name = "max_accumulated_residual_diff_threshold"
        if getattr(self, name) is not None:
            check_number(f"{who}.{name}", getattr(self, name), positive=True)
        for name in ("cfg_compute_first", "cfg_diff_compute_separate"):
            check_flag(f"{who}.{name}", getattr(self, name))
        if self.enable_separate_cfg is not None:
            check_flag(f"{who}.enable_separate_cfg", self.enable_separate_cfg)
        for name, allowed in _CHOICES.items():
            check_choice(f"{who}.{name}", getattr(self, name), allowed)
        if self.steps_computation_mask is not None:
            self.steps_computation_mask = check_mask(
                self.steps_computation_mask,
                steps=self.num_inference_steps,
                static=self.steps_computation_policy == "static",
            )

    def strify(self) -> str:
        """Return a short name of these settings, for file names and tables."""
        parts = [
            f"DBCache_F{self.Fn_compute_blocks}B{self.Bn_compute_blocks}",
            f"W{self.max_warmup_steps}I{self.warmup_interval}"
            f"M{max(0, self.max_cached_steps)}MC{max(0, self.max_continuous_cached_steps)}",
            f"R{self.residual_diff_threshold:g}",
        ]
        if self.steps_computation_mask is not None:
            mask = "".join(map(str, self.steps_computation_mask))
            parts.append(f"SCM{mask}_{self.steps_computation_policy}")
        if self.num_inference_steps is not None:
            parts.append(f"N{self.num_inference_steps}")
        if self.force_refresh_step_hint is not None:
            parts.append(f"FR{self.force_refresh_step_hint}_{self.force_refresh_step_policy}")
        if self.batch_reduce != "mean":
            parts.append(f"BR{self.batch_reduce}")
        if self.important_condition_threshold > 0:
            parts.append(f"IC{self.important_condition_threshold:g}")
        if self.cache_dtype != "model":
            parts.append(f"D{self.cache_dtype}")
        if self.enable_separate_cfg is not None:
            parts.append(f"CFG{int(self.enable_separate_cfg)}")
        return "_".join(parts)


@dataclass(kw_only=True)
class CalibratorConfig(Options):
    """How the skipped residual is predicted. This base reuses the last one (order 0)."""

    enable_calibrator: bool = False
    """Predict `hidden_states`; False reuses the last residual."""

    enable_encoder_calibrator: bool = False
    """Predict `encoder_hidden_states`; False reuses the last residual."""

    calibrator_cache_type: Literal["residual", "hidden_states"] = "residual"
    """What is predicted: what the skipped blocks add, or what comes out of them."""

    def validate(self) -> None:
        who = type(self).__name__
        for name in ("enable_calibrator", "enable_encoder_calibrator"):
            check_flag(f"{who}.{name}", getattr(self, name))
        name = "calibrator_cache_type"
        check_choice(f"{who}.{name}", getattr(self, name), ("residual", "hidden_states"))

    @property
    def order(self) -> int:
        """Degree of the prediction; it needs ``order + 1`` snapshots."""
        return 0

    def strify(self) -> str:
        """Return a short name of these settings."""
        return "T0O0"


@dataclass(kw_only=True)
class TaylorSeerCalibratorConfig(CalibratorConfig):
    """Taylor series in the step number, by backward differences (TaylorSeer, arXiv:2503.06923)."""

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    taylorseer_order: int = 1
    """0 (reuse) to 4; the lane keeps ``order + 1`` snapshots."""

    def validate(self) -> None:
        super().validate()
        check_int(
            f"{type(self).__name__}.taylorseer_order", self.taylorseer_order, 0, HIGHEST_ORDER
        )

    @property
    def order(self) -> int:
        return self.taylorseer_order

    def strify(self) -> str:
        return f"T1O{self.taylorseer_order}" if self.taylorseer_order else "T0O0"


@dataclass(kw_only=True)
class ParamsModifier:
    """What one block stack does differently: only the fields that were given count.

    Args:
        cache_config: fields for this stack, as in ``DBCacheConfig(max_warmup_steps=4)``.
        calibrator_config: the predictor of this stack.
    """

    cache_config: DBCacheConfig | None = None
    calibrator_config: CalibratorConfig | None = None

    def __post_init__(self) -> None:
        check_type("ParamsModifier.cache_config", self.cache_config, DBCacheConfig)
        check_type("ParamsModifier.calibrator_config", self.calibrator_config, CalibratorConfig)


def check_type(who: str, value: Any, kind: type) -> None:
    """Raise a TypeError unless `value` is None or a `kind`."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{who} must be a {kind.__name__} or None, got {value!r}")


@dataclass(frozen=True, slots=True)
class StackSettings:
    """The settings of one block stack, after modifiers: a private, checked copy."""

    cache: DBCacheConfig
    calibrator: CalibratorConfig

    @property
    def orders(self) -> tuple[int, int]:
        """Predictor orders for hidden and encoder states."""
        calibrator = self.calibrator
        return (
            calibrator.order if calibrator.enable_calibrator else 0,
            calibrator.order if calibrator.enable_encoder_calibrator else 0,
        )

    @property
    def slots(self) -> int:
        """Ring slots: one more than the highest order."""
        return max(self.orders) + 1

    @property
    def replace(self) -> bool:
        """Whether whole hidden states are predicted rather than residuals."""
        calibrator = self.calibrator
        enabled = calibrator.enable_calibrator or calibrator.enable_encoder_calibrator
        return enabled and calibrator.calibrator_cache_type == "hidden_states"

    def modified(self, modifier: ParamsModifier | None) -> StackSettings:
        """Return these settings with the given fields of `modifier` on top."""
        if modifier is None:
            return self
        cache = merge(self.cache, modifier.cache_config)
        return StackSettings(cache, modifier.calibrator_config or self.calibrator)


def merge(config: DBCacheConfig, partial: DBCacheConfig | None) -> DBCacheConfig:
    """Return a checked copy of `config` with the given fields of `partial` on top."""
    changes: Mapping[str, Any] = partial.given if partial is not None else {}
    return type(config)(**{**config.as_dict(), **changes})
