"""What makes the settings of a stack complete: options that go together, and its calibration."""

from __future__ import annotations

from dataclasses import replace

from dbcache.config.cache import DBCacheConfig, StackSettings
from dbcache.config.calibration import find_calibration
from dbcache.config.options import shown
from dbcache.config.policies import CALIBRATED, POLICIES, SCHEDULED
from dbcache.config.schedule import lanes_of


def prepare(settings: StackSettings, model: object, stack: str) -> StackSettings:
    """Return the settings of one stack, checked as a whole, with its part of the calibration.

    Args:
        settings: after all modifiers: partial configs may lack what belongs together.
        model: the module that has the stack's blocks.
        stack: name of the stack.

    Raises:
        ValueError: options that do not go together, or a calibration that is missing or is for
            another policy, model or stack.
    """
    cache = settings.cache
    _check_options(cache)
    if cache.policy in SCHEDULED:
        return replace(settings, calibration=lanes_of(cache.calibration, model, stack))
    if cache.policy not in CALIBRATED:
        return settings
    found = find_calibration(cache.policy, cache.calibration, model, stack)
    return replace(settings, calibration=found)


def _check_options(cache: DBCacheConfig) -> None:
    who, where = "DBCacheConfig", f"with policy={cache.policy!r}"
    refused, remedy = POLICIES[cache.policy].refuses, "leave it out, or use policy='dbcache'"
    cache.require_defaults(refused, where, remedy)
    if cache.cache_device == "cpu" and cache.decision_scope == "model":
        raise ValueError(
            f"{who}.cache_device must be 'model' with decision_scope='model', got 'cpu': later "
            f"stacks follow the first one without the host; use decision_scope='stack'"
        )
    if cache.calibration is not None and cache.policy not in (*CALIBRATED, *SCHEDULED):
        raise ValueError(
            f"{who}.calibration must come with a policy of {CALIBRATED}, got policy="
            f"{cache.policy!r}; leave it out"
        )
    is_static = cache.steps_computation_policy == "static" and cache.steps_computation_mask
    if cache.static_skip_probe and not is_static:
        raise ValueError(
            f"{who}.static_skip_probe must come with a steps_computation_mask and "
            f"steps_computation_policy='static', got {shown(cache.steps_computation_mask)} and "
            f"{cache.steps_computation_policy!r}: dynamic steps need the probe"
        )
