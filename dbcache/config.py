"""When to cache (`DBCacheConfig`), what single stacks do differently, and the two put together.

Names and defaults are cache-dit's, so that its users can switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dbcache.calibrators import CalibratorConfig
from dbcache.options import (
    Options,
    check_choice,
    check_flag,
    check_int,
    check_number,
    check_type,
)
from dbcache.schedule import check_mask

UNLIMITED = -1

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
    "decision_scope": ("stack", "model"),
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

    l1_hidden_states_diff_threshold: float = 0.0
    """Above 0: compare what comes out of the probe blocks rather than what they add, and take this
    as the threshold. 0: compare the residuals, by `residual_diff_threshold`."""

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

    steps_computation_mask: list[int] | str | None = None
    """One entry per step: 1 full, 0 cached as `steps_computation_policy` says. A name ("slow",
    "medium", "fast", "ultra") stands for `steps_mask` of that policy, made for the steps that a
    request has."""

    steps_computation_policy: Literal["dynamic", "static"] = "dynamic"
    """What a 0 in the mask means: "dynamic" asks the diff, "static" caches without asking."""

    force_refresh_step_hint: int | None = None
    """Start a new request after this many calls of the transformer (several chunks per call)."""

    force_refresh_step_policy: Literal["once", "repeat"] = "once"
    """Do so once per pipeline call or `refresh_context`, or each time."""

    cache_dtype: Literal["model", "float32", "fp8"] = "model"
    """How the ring stores residuals: in the model's dtype, in float32, or in fp8 (e4m3 with one
    float32 scale per token), which halves the memory of bfloat16."""

    decision_scope: Literal["stack", "model"] = "stack"
    """In models with several block stacks: "stack", each decides for itself; "model", the probe
    of the first one decides for all, and all blocks of the later ones (but their Bn) can be
    skipped."""

    cache_type: Literal["DBCache"] = "DBCache"
    """The method, as serving engines name it."""

    def validate(self) -> None:
        who = type(self).__name__
        for name, low in _LOWEST.items():
            check_int(f"{who}.{name}", getattr(self, name), low)
        for name in ("num_inference_steps", "force_refresh_step_hint"):
            if getattr(self, name) is not None:
                check_int(f"{who}.{name}", getattr(self, name), 1)
        for name in (
            "residual_diff_threshold",
            "important_condition_threshold",
            "l1_hidden_states_diff_threshold",
        ):
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

    @property
    def compares_hidden_states(self) -> bool:
        """Whether hidden states are compared rather than probe residuals."""
        return self.l1_hidden_states_diff_threshold > 0

    @property
    def threshold(self) -> float:
        """The threshold that the change is compared with."""
        if self.compares_hidden_states:
            return self.l1_hidden_states_diff_threshold
        return self.residual_diff_threshold

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
        if self.compares_hidden_states:
            parts.append(f"HS{self.l1_hidden_states_diff_threshold:g}")
        if self.important_condition_threshold > 0:
            parts.append(f"IC{self.important_condition_threshold:g}")
        if self.cache_dtype != "model":
            parts.append(f"D{self.cache_dtype}")
        if self.decision_scope != "stack":
            parts.append(f"DS{self.decision_scope}")
        if self.enable_separate_cfg is not None:
            parts.append(f"CFG{int(self.enable_separate_cfg)}")
        return "_".join(parts)


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
