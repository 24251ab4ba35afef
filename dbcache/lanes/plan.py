"""The plan of a request: for each step, what is known before the loop starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dbcache.config.options import check_choice
from dbcache.config.steps_mask import POLICIES, steps_mask
from dbcache.kernels.common.lane_state import PlanCode

if TYPE_CHECKING:
    from dbcache.config.cache import DBCacheConfig


def check_mask(mask: Sequence[int] | str, *, steps: int | None, static: bool) -> list[int] | str:
    """Return `mask` as a list of 0 and 1, or the name of a policy as it is.

    Raises:
        ValueError: it is empty, has other values, another length than `steps`, or would cache the
            first step without anything to take it from (`static`); an unknown name.
    """
    if isinstance(mask, str):
        check_choice("steps_computation_mask: a policy's name", mask, POLICIES)
        return mask
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
    if mask is None:
        return None
    if not isinstance(mask, str):
        static = config.steps_computation_policy == "static"
        checked = check_mask(mask, steps=steps, static=static)
        assert not isinstance(checked, str)
        return checked
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


def make_plan(
    config: DBCacheConfig, steps: int, request_steps: int | None = None
) -> list[PlanCode]:
    """Return the `PlanCode` of each of `steps` steps, of a request of `request_steps`.

    Warm-up first: steps ``0, i, 2i, ... < max_warmup_steps`` are full, and so are the first ones
    that make up `retention_ratio`; with a mask both are capped at its leading ones. Then the mask,
    a list by now (`resolve_mask`). Steps beyond the mask are as a 0 in it.
    """
    mask = config.steps_computation_mask
    assert not isinstance(mask, str)
    warmup = config.max_warmup_steps
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
