"""Who decides a step: the probe's change, or a signal that needs no block (`DBCacheConfig.policy`).

    dbcache     change of the probe residual            github.com/chengzeyi/ParaAttention (FBCache)
    easycache   movement of the latents times a rate    arXiv:2507.02860
    teacache    polynomial of the first block's input   arXiv:2411.19108
    seacache    change of the latents, filtered         arXiv:2602.18993
    magcache    ratios of a calibration run             arXiv:2506.09045

All but the first decide before the first block: a cached step then runs none but the last Bn, and
the residual that is kept and predicted spans all others. They add up what each step contributes
since the last full one and compare the sum with `residual_diff_threshold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dbcache.config.calibration import Calibration, find_calibration
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import PlanCode, Signal
from dbcache.kernels.decision.decide import advance

if TYPE_CHECKING:
    from dbcache.config.cache import DBCacheConfig, StackSettings

Source = Literal["probe", "latents", "modulated", "spectrum", "calibration"]


@dataclass(frozen=True)
class Policy:
    """One policy.

    Attributes:
        label: how it is written in names and tables.
        source: what is measured; nothing if it is "calibration".
        signal: how the measurement decides.
        refuses: options, by name, that have no meaning here, and why.
    """

    label: str
    source: Source
    signal: Signal
    refuses: dict[str, str]


_NO_PROBE = {
    "l1_hidden_states_diff_threshold": "no probe block runs whose output could be compared",
    "important_condition_threshold": "no tokens of a probe are compared",
}
_ONE_RATE = {"batch_reduce": "the rate is that of the batch as a whole"}
_NOTHING = {
    "batch_reduce": "nothing is measured",
    "cfg_diff_compute_separate": "nothing is measured",
}

POLICIES = {
    "dbcache": Policy("DBCache", "probe", Signal.CHANGE, {}),
    "easycache": Policy("EasyCache", "latents", Signal.RATE, _NO_PROBE | _ONE_RATE),
    "teacache": Policy("TeaCache", "modulated", Signal.SUM, _NO_PROBE),
    "seacache": Policy("SeaCache", "spectrum", Signal.SUM, _NO_PROBE),
    "magcache": Policy("MagCache", "calibration", Signal.SUM, _NO_PROBE | _NOTHING),
}
CALIBRATED = ("teacache", "magcache")
"""Policies that `dbcache.calibrate` prepares."""


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
    if cache.policy not in CALIBRATED:
        return settings
    found = find_calibration(cache.policy, cache.calibration, model, stack)
    return replace(settings, calibration=found)


def _check_options(cache: DBCacheConfig) -> None:
    who, defaults = "DBCacheConfig", type(cache)()
    for option, why in POLICIES[cache.policy].refuses.items():
        value, default = getattr(cache, option), getattr(defaults, option)
        if value != default:
            raise ValueError(
                f"{who}.{option} must be {default!r} with policy={cache.policy!r}, got {value!r}: "
                f"{why}; leave it out, or use policy='dbcache'"
            )
    if cache.calibration is not None and cache.policy not in CALIBRATED:
        raise ValueError(
            f"{who}.calibration must come with a policy of {CALIBRATED}, got policy="
            f"{cache.policy!r}; leave it out"
        )
    is_static = cache.steps_computation_policy == "static" and cache.steps_computation_mask
    if cache.static_skip_probe and not is_static:
        raise ValueError(
            f"{who}.static_skip_probe must come with a steps_computation_mask and "
            f"steps_computation_policy='static', got {cache.steps_computation_mask!r} and "
            f"{cache.steps_computation_policy!r}: dynamic steps need the probe"
        )


def coefficients(cache: DBCacheConfig, calibration: Calibration | None) -> tuple[float, ...]:
    """Return the polynomial of `Signal.SUM`, from the highest power down; the identity if open."""
    if calibration is not None and calibration.coefficients:
        return calibration.coefficients
    return (0.0,) * (ls.DEGREE - 1) + (1.0, 0.0)


def decide_ahead(
    plan: Sequence[int],
    ratios: Sequence[float],
    limits: Sequence[int],
    thresholds: Sequence[float],
) -> tuple[list[int], dict[int, float]]:
    """Return a plan whose dynamic steps are decided by MagCache's rule, and what each contributed.

        q := q * ratio,  E := E + |1 - q|       cached while E < threshold; q = 1, E = 0 when full

    Nothing is measured, so all of it is known before the first step and no step waits. The rest of
    the rule (limits, reference) is that of `decide`, which is run here on the host.

    Args:
        plan: plan codes.
        ratios: size of a step's residual over that of the step before; beyond the last: the last.
        limits: those of the lane's state.
        thresholds: those of the lane's state.
    """
    counters, values = [0] * ls.NUM_COUNTERS, [0.0] * ls.NUM_VALUES
    codes, changes, q = [], {}, 1.0
    for step, code in enumerate(plan):
        q *= ratios[min(step, len(ratios) - 1)]
        is_open = code == PlanCode.DYNAMIC
        change = abs(1 - q) if is_open and counters[ls.REFERENCE] else None
        advance(counters, values, limits, thresholds, code, change)
        codes.append(ls.KNOWN + counters[ls.REASON] if is_open else int(code))
        if change is not None:
            changes[step] = change
        if not counters[ls.CACHED]:
            q = 1.0
    return codes, changes
