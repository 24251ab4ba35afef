"""The plan of a request: for each step, what is known before the loop starts."""

from __future__ import annotations

from collections.abc import Sequence

from dbcache.config.cache import DBCacheConfig
from dbcache.config.calibration import Calibration
from dbcache.config.steps_mask import check_mask, steps_mask
from dbcache.kernels.common import lane_state
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.kernels.decision.decide import advance


def resolve_mask(config: DBCacheConfig, steps: int | None, who: str) -> list[int] | None:
    """Return the mask of `config` for a request of `steps` steps; None where there is none.

    Args:
        config: when to cache.
        steps: steps of the request, None if nothing tells them.
        who: whose request it is, for the error.

    Raises:
        ValueError: the mask has another length, or it is a policy's name and `steps` is None.
    """
    mask = config.steps_computation_mask
    if not isinstance(mask, str):
        static = config.steps_computation_policy == "static"
        return check_mask(f"{type(config).__name__}.steps_computation_mask", mask, steps, static)
    if steps is None:
        raise ValueError(
            f"{who}: the number of steps must be known for steps_computation_mask={mask!r}, got "
            f"none: set num_inference_steps (in enable or refresh_context; for transformers that "
            f"share a request's steps, the part of each, by its ParamsModifier), or give the "
            f"mask as a list, as from dbcache.steps_mask"
        )
    return steps_mask(total_steps=steps, mask_policy=mask)


def check_retention(config: DBCacheConfig, steps: int | None, who: str) -> None:
    """Raise a ValueError if `retention_ratio` needs the number of steps and nothing tells it."""
    if config.retention_ratio > 0 and steps is None:
        raise ValueError(
            f"{who}: the number of steps must be known for retention_ratio="
            f"{config.retention_ratio!r}, got none: set num_inference_steps (in enable or "
            f"refresh_context), or set max_warmup_steps instead"
        )


def warmup_steps(config: DBCacheConfig, request_steps: int | None, loop: int | None = None) -> int:
    """Return how long the warm-up of a request of `request_steps` is, of a loop that it shares.

    Where `max_warmup_steps` was not given that is half of the steps, and its default at most: the
    default would leave nothing to cache in an image of few steps (docs/options.md).
    """
    has_many = loop is not None and loop >= 2 * config.max_warmup_steps
    if request_steps is None or config.warmup is not None or has_many:
        return config.max_warmup_steps
    return min(config.max_warmup_steps, request_steps // 2)


def make_plan(
    config: DBCacheConfig,
    steps: int,
    request_steps: int | None = None,
    loop: int | None = None,
) -> list[PlanCode]:
    """Return the `PlanCode` of each of `steps` steps, of a request as `warmup_steps` takes it.

    Warm-up first: steps ``0, i, 2i, ... < warmup_steps(...)`` are full, and so are the first ones
    that make up `retention_ratio`; with a mask both are capped at its leading ones. Then the mask.
    Steps beyond the mask are as a 0 in it. A name in its place counts as none: the request that
    begins brings its list (`resolve_mask`).
    """
    given = config.steps_computation_mask
    mask = None if isinstance(given, str) else given
    warmup = warmup_steps(config, request_steps, loop)
    retained = int(config.retention_ratio * (request_steps or 0) + 0.5)
    if mask is not None:
        leading_ones = mask.index(0) if 0 in mask else len(mask)
        warmup, retained = min(warmup, leading_ones), min(retained, leading_ones)
    skip = PlanCode.STATIC if config.steps_computation_policy == "static" else PlanCode.DYNAMIC
    plan: list[PlanCode] = []
    for step in range(steps):
        if step < retained or (step < warmup and step % config.warmup_interval == 0):
            plan.append(PlanCode.WARMUP)
        elif mask is None:
            plan.append(PlanCode.DYNAMIC)
        elif step < len(mask) and mask[step]:
            plan.append(PlanCode.MASK)
        else:
            plan.append(skip)
    return plan


def coefficients(cache: DBCacheConfig, calibration: Calibration | None) -> tuple[float, ...]:
    """Return the polynomial of `Signal.SUM`, from the highest power down; the identity if open."""
    if calibration is not None and calibration.coefficients:
        return calibration.coefficients
    return (0.0,) * (lane_state.DEGREE - 1) + (1.0, 0.0)


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
    counters, values = [0] * lane_state.NUM_COUNTERS, [0.0] * lane_state.NUM_VALUES
    codes, changes, q = [], {}, 1.0
    for step, code in enumerate(plan):
        q *= ratios[min(step, len(ratios) - 1)]
        is_open = code == PlanCode.DYNAMIC
        change = abs(1 - q) if is_open and counters[lane_state.REFERENCE] else None
        advance((counters, values, limits, thresholds), code, change)
        codes.append(lane_state.KNOWN + counters[lane_state.REASON] if is_open else int(code))
        if change is not None:
            changes[step] = change
        if not counters[lane_state.CACHED]:
            q = 1.0
    return codes, changes
