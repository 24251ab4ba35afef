"""Options that do nothing beside each other: found when the cache is switched on, and said once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dbcache.config.cache import DBCacheConfig, StackSettings
from dbcache.config.policies import POLICIES

LIMITS = (
    "residual_diff_threshold",
    "l1_hidden_states_diff_threshold",
    "max_accumulated_residual_diff_threshold",
    "important_condition_threshold",
    "batch_reduce",
    "max_cached_steps",
    "max_continuous_cached_steps",
)
"""What a step is not asked that a static mask caches."""


def _is_static(cache: DBCacheConfig) -> bool:
    is_static = cache.steps_computation_policy == "static"
    return is_static and cache.steps_computation_mask is not None


@dataclass(frozen=True, slots=True)
class Rule:
    """Where `holds`, those of `options` that were given have no effect.

    Attributes:
        options: names.
        holds: whether the settings are such.
        why: what makes them so, and what to do.
    """

    options: tuple[str, ...]
    holds: Callable[[DBCacheConfig], bool]
    why: str


RULES = (
    Rule(
        ("steps_computation_policy",),
        lambda c: c.steps_computation_policy == "static" and c.steps_computation_mask is None,
        "'static' says what a 0 in a mask means, and there is none, so each step asks the "
        "change; give steps_computation_mask, too",
    ),
    Rule(
        LIMITS,
        _is_static,
        "steps_computation_policy='static' caches where the mask says 0, without asking; leave "
        "it out, or use 'dynamic'",
    ),
    Rule(
        ("residual_diff_threshold",),
        lambda c: c.compares_hidden_states and not _is_static(c),
        "l1_hidden_states_diff_threshold is compared in its place; leave one of them out",
    ),
    Rule(
        ("Fn_compute_blocks",),
        lambda c: POLICIES[c.policy].measures != "probe",
        "a policy other than 'dbcache' has no probe; leave it out",
    ),
    Rule(
        ("warmup_interval",),
        lambda c: c.warmup == 0,
        "max_warmup_steps is 0; leave one of them out",
    ),
    Rule(
        ("non_compute_blocks_diff_threshold",),
        lambda c: not c.Bn_compute_blocks_ids,
        "all of the last blocks run without Bn_compute_blocks_ids; give these, too",
    ),
    Rule(
        ("force_refresh_step_policy",),
        lambda c: c.force_refresh_step_hint is None,
        "there is no force_refresh_step_hint; give it, too",
    ),
    Rule(
        ("cfg_compute_first",),
        lambda c: c.enable_separate_cfg is False,
        "enable_separate_cfg=False makes all calls one branch; leave one of them out",
    ),
)
"""What has no effect beside what."""


def without_effect(settings: StackSettings) -> list[str]:
    """Return a text on each option that was given and has no effect."""
    cache, predictor = settings.cache, settings.predictor
    defaults = type(cache)().as_dict()
    texts = []
    for rule in RULES:
        given = {n: v for n, v in cache.given.items() if n in rule.options and v != defaults[n]}
        if given and rule.holds(cache):
            named = ", ".join(f"{name}={value!r}" for name, value in given.items())
            texts.append(f"{named} has no effect: {rule.why}")
    own = [name for name in predictor.given if not name.startswith("enable_")]
    if own and not any(settings.predicts):
        name = type(predictor).__name__
        texts.append(
            f"{name}.{own[0]} has no effect: neither enable_calibrator nor "
            f"enable_encoder_calibrator is on, so the last residual is reused; switch one on"
        )
    return texts
