"""The plan of a request: for each step, what is known before the loop starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dbcache.kernels.lane_state import PlanCode

if TYPE_CHECKING:
    from dbcache.config import DBCacheConfig


def check_mask(mask: Sequence[int], *, steps: int | None, static: bool) -> list[int]:
    """Return `mask` as a list of 0 and 1.

    Raises:
        ValueError: it is empty, has other values, another length than `steps`, or would cache the
            first step without anything to take it from (`static`).
    """
    values = [int(entry) if entry in (0, 1) else entry for entry in mask]
    if not values or any(not isinstance(entry, int) or entry not in (0, 1) for entry in values):
        raise ValueError(f"steps_computation_mask must hold only 0 and 1, got {list(mask)!r}")
    if steps is not None and len(values) != steps:
        raise ValueError(
            f"steps_computation_mask must have one entry per step, got {len(values)} for "
            f"{steps} steps; make it as long as the steps that the transformer runs"
        )
    if static and values[0] == 0:
        raise ValueError(
            "steps_computation_mask must begin with 1 under the static policy, got 0: nothing is "
            "cached yet at the first step"
        )
    return values


def make_plan(config: DBCacheConfig, steps: int) -> list[PlanCode]:
    """Return the `PlanCode` of each of `steps` steps.

    Warm-up first: steps ``0, i, 2i, ... < max_warmup_steps`` are full; with a mask the warm-up is
    capped at its leading ones. Then the mask. Steps beyond the mask are as a 0 in it.
    """
    mask = config.steps_computation_mask
    warmup = config.max_warmup_steps
    if mask is not None:
        leading_ones = mask.index(0) if 0 in mask else len(mask)
        warmup = min(warmup, leading_ones)
    skip = PlanCode.STATIC if config.steps_computation_policy == "static" else PlanCode.DYNAMIC
    plan: list[PlanCode] = []
    for step in range(steps):
        if step < warmup and step % config.warmup_interval == 0:
            plan.append(PlanCode.WARMUP)
        elif mask is None:
            plan.append(PlanCode.DYNAMIC)
        elif step < len(mask) and mask[step]:
            plan.append(PlanCode.MASK)
        else:
            plan.append(skip)
    return plan
