"""When to cache (`DBCacheConfig`), what single stacks do differently, and the two put together.

Names and defaults are cache-dit's, so that its users can switch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from dbcache.config.calibration import Calibration
from dbcache.config.options import (
    Options,
    check_choice,
    check_flag,
    check_ids,
    check_int,
    check_number,
    check_type,
)
from dbcache.config.policies import POLICIES
from dbcache.config.predictors import CalibratorConfig, DMDCalibratorConfig
from dbcache.lanes.plan import check_mask

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
    "policy": tuple(POLICIES),
}


@dataclass(kw_only=True)
class DBCacheConfig(Options):
    """When a step is cached.

    Raises:
        TypeError: an unknown option (the error names the nearest one).
        ValueError: a value outside its range.
    """

    policy: Literal["dbcache", "easycache", "teacache", "seacache", "magcache"] = "dbcache"
    """What decides: the change of the probe residual, or a signal that needs no block. See
    `policies`."""

    Fn_compute_blocks: int = 8
    """First n blocks, always run: the probe whose residual is compared. At least 1. Policies other
    than "dbcache" have no probe and run none of them on a cached step."""

    Bn_compute_blocks: int = 0
    """Last n blocks, always run."""

    Bn_compute_blocks_ids: list[int] = field(default_factory=list)
    """Which of the last n blocks run on a cached step, 0 to n - 1; none given: all. The others add
    what they added on the last full step, while `non_compute_blocks_diff_threshold` allows it."""

    non_compute_blocks_diff_threshold: float = 0.08
    """Such a block runs, too, if its input changed by this or more since the last full step."""

    residual_diff_threshold: float = 0.08
    """A step is cached if the relative L1 change of the probe residual is below this.
    0 never caches, 1 or more always (within the limits). With another policy: the step is cached if
    the sum of its signal since the last full step is below this; 0 never caches."""

    calibration: str | os.PathLike[str] | Mapping[str, Any] | None = None
    """What `dbcache.calibrate` wrote, for the policies "magcache" and "teacache": the file or its
    content. None: for TeaCache the published polynomial of the model, if there is one."""

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

    retention_ratio: float = 0.0
    """Share of a request's steps, at its beginning, that are full as well, rounded to the nearest
    step. Above 0 the number of steps must be known."""

    warmup_interval: int = 1
    """Distance of the full steps in the warm-up; those between them are decided by the diff."""

    max_cached_steps: int = UNLIMITED
    """Largest number of cached steps per request and lane; -1: no limit, 0: never cache."""

    max_continuous_cached_steps: int = UNLIMITED
    """Largest number of cached steps in a row; -1: no limit, 0: never cache."""

    enable_separate_cfg: bool | None = None
    """True: calls without a name (`cache_context`) alternate between two guidance branches; False:
    they are one. None: found from the calls of the pipeline; without one, as the model's row says.
    """

    cfg_compute_first: bool = False
    """Of two calls without names the unconditional one comes first."""

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

    static_skip_probe: bool = False
    """With a mask and the policy "static": cached steps skip the first n blocks as well. No step of
    such a request measures anything, so none is needed as a probe."""

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

    cache_type: Literal["DBCache", "DBPrune"] = "DBCache"
    """The method, as serving engines name it; that of another config is an error."""

    cache_types: ClassVar[tuple[str, ...]] = ("DBCache",)
    """What `cache_type` may be."""

    def validate(self) -> None:
        who = type(self).__name__
        for name, low in _LOWEST.items():
            check_int(f"{who}.{name}", getattr(self, name), low)
        for name in ("num_inference_steps", "force_refresh_step_hint"):
            if getattr(self, name) is not None:
                check_int(f"{who}.{name}", getattr(self, name), 1)
        for name in (
            "residual_diff_threshold",
            "non_compute_blocks_diff_threshold",
            "retention_ratio",
            "important_condition_threshold",
            "l1_hidden_states_diff_threshold",
        ):
            check_number(f"{who}.{name}", getattr(self, name))
        if self.retention_ratio > 1:
            raise ValueError(
                f"{who}.retention_ratio must be at most 1, got {self.retention_ratio!r}"
            )
        calibration: Any = self.calibration
        if not isinstance(calibration, str | os.PathLike | Mapping | None):
            must = "a path, a mapping or None"
            raise TypeError(f"{who}.calibration must be {must}, got {calibration!r}")
        name = "max_accumulated_residual_diff_threshold"
        if getattr(self, name) is not None:
            check_number(f"{who}.{name}", getattr(self, name), positive=True)
        for name in ("cfg_compute_first", "cfg_diff_compute_separate", "static_skip_probe"):
            check_flag(f"{who}.{name}", getattr(self, name))
        if self.enable_separate_cfg is not None:
            check_flag(f"{who}.enable_separate_cfg", self.enable_separate_cfg)
        for name, allowed in _CHOICES.items():
            check_choice(f"{who}.{name}", getattr(self, name), allowed)
        check_choice(f"{who}.cache_type", self.cache_type, self.cache_types)
        if self.Bn_compute_blocks_ids and not self.Bn_compute_blocks:
            raise ValueError(
                f"{who}.Bn_compute_blocks_ids must be empty where Bn_compute_blocks is 0, got "
                f"{self.Bn_compute_blocks_ids!r}; set Bn_compute_blocks, too"
            )
        self.Bn_compute_blocks_ids = check_ids(
            f"{who}.Bn_compute_blocks_ids", self.Bn_compute_blocks_ids, self.Bn_compute_blocks
        )
        if self.steps_computation_mask is not None:
            self.steps_computation_mask = check_mask(
                self.steps_computation_mask,
                steps=self.num_inference_steps,
                static=self.steps_computation_policy == "static",
            )

    @property
    def probe_blocks(self) -> int:
        """Blocks that run before the step is decided; 0 decides before the first block."""
        has_probe = POLICIES[self.policy].source == "probe" and not self.static_skip_probe
        return self.Fn_compute_blocks if has_probe else 0

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

    @property
    def label(self) -> str:
        """Name of the method."""
        return POLICIES[self.policy].label

    def strify(self) -> str:
        """Return a short name of these settings, for file names and tables."""
        parts = [
            f"{self.label}_F{self.probe_blocks}B{self.Bn_compute_blocks}",
            f"W{self.max_warmup_steps}I{self.warmup_interval}"
            f"M{_limit(self.max_cached_steps)}MC{_limit(self.max_continuous_cached_steps)}",
            f"R{self.residual_diff_threshold:g}",
        ]
        if self.steps_computation_mask is not None:
            mask = "".join(map(str, self.steps_computation_mask))
            parts.append(f"SCM{mask}_{self.steps_computation_policy}")
        if self.num_inference_steps is not None:
            parts.append(f"N{self.num_inference_steps}")
        if self.force_refresh_step_hint is not None:
            parts.append(f"FR{self.force_refresh_step_hint}_{self.force_refresh_step_policy}")
        if self.Bn_compute_blocks_ids:
            ids = "-".join(map(str, self.Bn_compute_blocks_ids))
            parts.append(f"BI{ids}R{self.non_compute_blocks_diff_threshold:g}")
        if self.retention_ratio > 0:
            parts.append(f"RR{self.retention_ratio:g}")
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


def _limit(steps: int) -> str:
    """Return a limit for a name: 0 means none there, as in cache-dit."""
    return "0" if steps == UNLIMITED else str(steps) if steps else "never"


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
    calibration: Calibration | None = None
    """The stack's part of `DBCacheConfig.calibration`, where the policy takes one."""
    steps: int | None = None
    """Steps of the request, as far as they are known."""

    def __post_init__(self) -> None:
        if self.cache.cache_dtype == "fp8" and isinstance(self.calibrator, DMDCalibratorConfig):
            raise ValueError(
                "DMDCalibratorConfig: the ring must be in the model's dtype or float32, got "
                "cache_dtype='fp8'; choose another cache_dtype or calibrator"
            )

    @property
    def predicts(self) -> tuple[bool, bool]:
        """Whether hidden and encoder states are predicted, rather than reused."""
        calibrator = self.calibrator
        return calibrator.enable_calibrator, calibrator.enable_encoder_calibrator

    @property
    def orders(self) -> tuple[int, int]:
        """Orders of the series that `decide` computes, for hidden and encoder states."""
        order = self.calibrator.order
        hidden, encoder = self.predicts
        return order if hidden else 0, order if encoder else 0

    @property
    def slots(self) -> int:
        """Ring slots: what the predictor wants, or one."""
        return self.calibrator.slots if any(self.predicts) else 1

    @property
    def replace(self) -> bool:
        """Whether whole hidden states are predicted rather than residuals."""
        return any(self.predicts) and self.calibrator.calibrator_cache_type == "hidden_states"

    @property
    def buffers(self) -> tuple[object, ...]:
        """What the buffers of a lane depend on."""
        cache = self.cache
        return (
            self.slots,
            self.replace,
            cache.cache_dtype,
            cache.policy,
            cache.compares_hidden_states,
            cache.important_condition_threshold > 0,
            cache.cfg_diff_compute_separate,
        )

    @property
    def recorded(self) -> tuple[object, ...]:
        """What recorded work depends on. The rest lies on the device and may change."""
        return (*self.buffers, self.calibrator.recorded)

    def modified(self, modifier: ParamsModifier | None) -> StackSettings:
        """Return these settings with the given fields of `modifier` on top."""
        if modifier is None:
            return self
        cache = merge(self.cache, modifier.cache_config)
        calibrator = modifier.calibrator_config or self.calibrator
        return replace(self, cache=cache, calibrator=calibrator)


def merge(config: DBCacheConfig, partial: DBCacheConfig | None) -> DBCacheConfig:
    """Return a checked copy of `config` with the given fields of `partial` on top.

    Where `partial` names another method by its `cache_type`, that one's config is returned, with
    what was given in `config`.
    """
    changes: Mapping[str, Any] = partial.given if partial is not None else {}
    if partial is not None and changes.get("cache_type", config.cache_type) != config.cache_type:
        kept = {name: value for name, value in config.given.items() if name != "cache_type"}
        return type(partial)(**{**kept, **changes})
    return type(config)(**{**config.as_dict(), **changes})
