"""When to cache (`DBCacheConfig`), what single stacks do differently, and the two put together.

Names and defaults are cache-dit's, so that its users can switch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from dbcache.config.calibration import Calibration
from dbcache.config.flat import PREDICTION, split
from dbcache.config.options import (
    Options,
    check_ids,
    check_method,
    check_type,
    option,
    reject_unknown,
    shown,
)
from dbcache.config.policies import POLICIES
from dbcache.config.predictors import CalibratorConfig, DMDCalibratorConfig
from dbcache.config.steps_mask import check_mask, steps_mask

UNLIMITED = -1

_SHORT = {
    "steps_computation_mask": "SCM{0.mask_digits}_{0.steps_computation_policy}",
    "num_inference_steps": "N{0.num_inference_steps}",
    "force_refresh_step_hint": "FR{0.force_refresh_step_hint}_{0.force_refresh_step_policy}",
    "Bn_compute_blocks_ids": "BI{0.ids}R{0.non_compute_blocks_diff_threshold:g}",
    "retention_ratio": "RR{0.retention_ratio:g}",
    "batch_reduce": "BR{0.batch_reduce}",
    "l1_hidden_states_diff_threshold": "HS{0.l1_hidden_states_diff_threshold:g}",
    "important_condition_threshold": "IC{0.important_condition_threshold:g}",
    "cache_dtype": "D{0.cache_dtype}",
    "cache_device": "CD{0.cache_device}",
    "decision_scope": "DS{0.decision_scope}",
    "enable_separate_cfg": "CFG{0.enable_separate_cfg:d}",
}
"""What `strify` says of fields that have another value than their default."""


@dataclass(kw_only=True)
class DBCacheConfig(Options):
    """When a step is cached.

    Raises:
        TypeError: an unknown option (the error names the nearest one).
        ValueError: a value outside its range.
    """

    policy: Literal[
        "dbcache", "easycache", "teacache", "seacache", "magcache", "schedule", "guarded_schedule"
    ] = "dbcache"
    """What decides: the change of the probe residual, or a signal that needs no block. See
    `policies`. The last two are what `enable` sets with a `schedule`."""

    Fn_compute_blocks: int = option(8, low=1)
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

    batch_reduce: Literal["mean", "max", "each"] = "mean"
    """The change of a batch: "mean" of the batch as a whole, or "max", that of its worst sample.
    "each": every sample of the batch decides for itself, with limits and snapshots of its own."""

    important_condition_threshold: float = 0.0
    """Above 0: compare only the tokens whose own relative L1 change is above this, if there are
    any. 0: all tokens."""

    l1_hidden_states_diff_threshold: float = 0.0
    """Above 0: compare what comes out of the probe blocks rather than what they add, and take this
    as the threshold. 0: compare the residuals, by `residual_diff_threshold`."""

    max_accumulated_residual_diff_threshold: float | None = option(None, positive=True)
    """A full step is due once the diffs since the last full step sum up to this. None: no limit."""

    max_warmup_steps: int = 8
    """Steps ``0, warmup_interval, 2 * warmup_interval, ... < max_warmup_steps`` are full."""

    retention_ratio: float = option(0.0, high=1)
    """Share of a request's steps, at its beginning, that are full as well, rounded to the nearest
    step. Above 0 the number of steps must be known."""

    warmup_interval: int = option(1, low=1)
    """Distance of the full steps in the warm-up; those between them are decided by the diff."""

    max_cached_steps: int = option(UNLIMITED, low=UNLIMITED)
    """Largest number of cached steps per request and lane; -1: no limit, 0: never cache."""

    max_continuous_cached_steps: int = option(UNLIMITED, low=UNLIMITED)
    """Largest number of cached steps in a row; -1: no limit, 0: never cache."""

    enable_separate_cfg: bool | None = None
    """True: calls without a name (`cache_context`) alternate between two guidance branches; False:
    they are one. None: found from the calls of the pipeline; without one, as the model's row says.
    """

    cfg_compute_first: bool = False
    """Of two calls without names the unconditional one comes first."""

    cfg_diff_compute_separate: bool = True
    """False: the second branch of a step takes the diff of the first."""

    num_inference_steps: int | None = option(None, low=1)
    """Steps per request. A transformer that is called without its pipeline starts a new request
    after so many; a pipeline call always starts one."""

    steps_computation_mask: list[int] | str | None = option(None, check=check_mask)
    """One entry per step: 1 full, 0 cached as `steps_computation_policy` says. A name ("slow",
    "medium", "fast", "ultra") stands for `steps_mask` of that policy, made for the steps that a
    request has."""

    steps_computation_policy: Literal["dynamic", "static"] = "dynamic"
    """What a 0 in the mask means: "dynamic" asks the diff, "static" caches without asking."""

    static_skip_probe: bool = False
    """With a mask and the policy "static": cached steps skip the first n blocks as well. No step of
    such a request measures anything, so none is needed as a probe."""

    force_refresh_step_hint: int | None = option(None, low=1)
    """Start a new request after this many calls of the transformer (several chunks per call)."""

    force_refresh_step_policy: Literal["once", "repeat"] = "once"
    """Do so once per pipeline call or `refresh_context`, or each time."""

    cache_dtype: Literal["model", "float32", "fp8"] = "model"
    """How the ring stores residuals: in the model's dtype, in float32, or in fp8 (e4m3 with one
    float32 scale per token), which halves the memory of bfloat16."""

    cache_device: Literal["model", "cpu"] = "model"
    """Where the ring lies: on the model's device, or in host memory, pinned where the model is on a
    GPU. Then a step that may be cached fetches it while the probe runs."""

    decision_scope: Literal["stack", "model"] = "stack"
    """In models with several block stacks: "stack", each decides for itself; "model", the probe
    of the first one decides for all, and all blocks of the later ones (but their Bn) can be
    skipped."""

    cache_type: str = option("DBCache", check=partial(check_method, allowed=("DBCache",)))
    """The method, as serving engines name it; that of another config is an error."""

    def __post_init__(self) -> None:
        who, ids = type(self).__name__, self.Bn_compute_blocks_ids
        if ids and not self.Bn_compute_blocks:
            raise ValueError(
                f"{who}.Bn_compute_blocks_ids must be empty where Bn_compute_blocks is 0, got "
                f"{shown(ids)}; set Bn_compute_blocks, too"
            )
        check_ids(f"{who}.Bn_compute_blocks_ids", ids, self.Bn_compute_blocks)
        steps, static = self.num_inference_steps, self.steps_computation_policy == "static"
        check_mask(f"{who}.steps_computation_mask", self.steps_computation_mask, steps, static)
        if self.batch_reduce == "each":
            why = "samples decide for themselves by the probe alone"
            names = ("policy", "Bn_compute_blocks_ids", "cfg_diff_compute_separate")
            remedy = "leave it out, or choose 'mean' or 'max'"
            self.require_defaults(dict.fromkeys(names, why), "with batch_reduce='each'", remedy)

    @property
    def probe_blocks(self) -> int:
        """Blocks that run before the step is decided; 0 decides before the first block."""
        has_probe = POLICIES[self.policy].measures == "probe" and not self.static_skip_probe
        return self.Fn_compute_blocks if has_probe else 0

    @property
    def warmup(self) -> int | None:
        """`max_warmup_steps` where it was given; None where the plan chooses."""
        return self.given.get("max_warmup_steps")

    @property
    def max_steps(self) -> int:
        """Most cached steps of a request; -1: no limit."""
        return self.max_cached_steps

    @property
    def compares_hidden_states(self) -> bool:
        """Whether hidden states are compared rather than probe residuals."""
        return self.l1_hidden_states_diff_threshold > 0

    @property
    def threshold(self) -> float:
        """The threshold that the change is compared with."""
        return self.l1_hidden_states_diff_threshold or self.residual_diff_threshold

    @property
    def ids(self) -> str:
        """`Bn_compute_blocks_ids` for a name."""
        return "-".join(map(str, self.Bn_compute_blocks_ids))

    @property
    def mask_digits(self) -> str:
        """The mask for a name: a digit per step, or the mask's own name while steps are unknown."""
        mask, steps = self.steps_computation_mask, self.num_inference_steps
        if isinstance(mask, str) and steps is not None:
            mask = steps_mask(total_steps=steps, mask_policy=mask)
        return "".join(map(str, mask or ()))

    def strify(self) -> str:
        """Return a short name of these settings, for file names and tables."""
        name = self.cache_type if self.policy == "dbcache" else POLICIES[self.policy].label
        parts = [
            f"{name}_F{self.probe_blocks}B{self.Bn_compute_blocks}",
            f"W{self.max_warmup_steps}I{self.warmup_interval}"
            f"M{_limit(self.max_steps)}MC{_limit(self.max_continuous_cached_steps)}",
            f"R{self.residual_diff_threshold:g}",
        ]
        defaults = DBCacheConfig().as_dict()
        parts += [s.format(self) for n, s in _SHORT.items() if getattr(self, n) != defaults[n]]
        return "_".join(parts)


def _limit(steps: int) -> str:
    """Return a limit for a name: 0 means none there, as in cache-dit."""
    return "0" if steps == UNLIMITED else str(steps) if steps else "never"


@dataclass(init=False)
class ParamsModifier:
    """What one block stack does differently: only the fields that were given count.

    Args:
        cache_config: fields for this stack, as in ``DBCacheConfig(max_warmup_steps=4)``.
        calibrator_config: the predictor of this stack.
        **options: such fields by themselves, on top of `cache_config`, and those of a predictor,
            as in ``ParamsModifier(max_warmup_steps=4, enable_taylorseer=True)``.

    Raises:
        TypeError: an unknown option or a wrong type. ValueError: a value that is not allowed.
    """

    cache_config: DBCacheConfig | None
    calibrator_config: CalibratorConfig | None

    def __init__(
        self,
        cache_config: DBCacheConfig | None = None,
        calibrator_config: CalibratorConfig | None = None,
        **options: Any,
    ) -> None:
        check_type("ParamsModifier.cache_config", cache_config, DBCacheConfig)
        check_type("ParamsModifier.calibrator_config", calibrator_config, CalibratorConfig)
        fields, predictor = split("ParamsModifier", options, calibrator_config)
        if fields:
            cache_config = cache_config or DBCacheConfig()
            reject_unknown("ParamsModifier", fields, (*cache_config.names(), *PREDICTION))
            cache_config = cache_config.changed(**fields)
        self.cache_config = cache_config
        self.calibrator_config = predictor


@dataclass(frozen=True, slots=True)
class StackSettings:
    """The settings of one block stack, after modifiers: a private, checked copy."""

    cache: DBCacheConfig
    predictor: CalibratorConfig
    calibration: Calibration | None = None
    """The stack's part of `DBCacheConfig.calibration`, where the policy takes one."""
    steps: int | None = None
    """Steps of the request, as far as they are known."""
    loop: int | None = None
    """Steps of the loop whose steps the request shares with those of other transformers."""

    def __post_init__(self) -> None:
        if self.cache.cache_dtype == "fp8" and isinstance(self.predictor, DMDCalibratorConfig):
            raise ValueError(
                "DMDCalibratorConfig: the ring must be in the model's dtype or float32, got "
                "cache_dtype='fp8'; choose another cache_dtype or calibrator"
            )

    @property
    def predicts(self) -> tuple[bool, bool]:
        """Whether hidden and encoder states are predicted, rather than reused."""
        return self.predictor.enable_calibrator, self.predictor.enable_encoder_calibrator

    @property
    def orders(self) -> tuple[int, int]:
        """Orders of the series that `decide` computes, for hidden and encoder states."""
        hidden, encoder = self.predicts
        return self.predictor.order * hidden, self.predictor.order * encoder

    @property
    def slots(self) -> int:
        """Ring slots: what the predictor wants, or one."""
        return self.predictor.slots if any(self.predicts) else 1

    @property
    def replace(self) -> bool:
        """Whether whole hidden states are predicted rather than residuals."""
        return any(self.predicts) and self.predictor.calibrator_cache_type == "hidden_states"

    @property
    def buffers(self) -> tuple[object, ...]:
        """What the buffers of a lane depend on."""
        cache = self.cache
        stored = (self.slots, self.replace, cache.cache_dtype, cache.cache_device)
        by_token = cache.important_condition_threshold > 0
        measured = (cache.policy, cache.compares_hidden_states, by_token)
        return (*stored, *measured, cache.cfg_diff_compute_separate, cache.batch_reduce == "each")

    @property
    def recorded(self) -> tuple[object, ...]:
        """What recorded work depends on. The rest lies on the device and may change."""
        predictor = self.predictor
        weights = (predictor.strify(), *self.predicts) if predictor.by_forecaster else ()
        return (*self.buffers, *weights)

    def modified(self, modifier: ParamsModifier | None) -> StackSettings:
        """Return these settings with the given fields of `modifier` on top."""
        if modifier is None:
            return self
        cache = merge(self.cache, modifier.cache_config)
        predictor = modifier.calibrator_config or self.predictor
        return replace(self, cache=cache, predictor=predictor)


def alike(settings: StackSettings, modifiers: Sequence[ParamsModifier | None]) -> bool:
    """Whether these modifiers of `settings` all come to the same."""
    each = [settings.modified(modifier) for modifier in modifiers]
    return all(x == each[0] and x.cache.warmup == each[0].cache.warmup for x in each)


def merge(config: DBCacheConfig, partial: DBCacheConfig | None) -> DBCacheConfig:
    """Return a checked copy of `config` with the given fields of `partial` on top.

    Where `partial` names another method by its `cache_type`, that one's config is returned, with
    what was given in `config`.
    """
    changes = partial.given if partial else {}
    if partial and changes.get("cache_type", config.cache_type) != config.cache_type:
        kept = {name: value for name, value in config.given.items() if name != "cache_type"}
        return type(partial)(**{**kept, **changes})
    return config.changed(**changes)
