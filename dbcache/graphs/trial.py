"""What a recording must pass before it is used: a few steps that must give what eager ones give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dbcache.graphs.recording import Recordable
from dbcache.kernels.common.lane_state import PlanCode

TOLERANCES = {torch.float32: 1e-4}
TOLERANCE = 1e-2
"""Largest relative L2 distance of a replayed step from an eager one that is taken for the noise of
kernels that add in no fixed order; by dtype, and for the others."""

TRIED = {PlanCode.MASK: "full", PlanCode.STATIC: "cached", PlanCode.DYNAMIC: "dynamic"}
"""Steps that are tried, and their names. A dynamic step makes the kernels of the decision run."""


def run_trial(
    request: Recordable, leaves: list[Any], step: Callable[[list[Any]], list[Any]]
) -> list[list[Any]]:
    """Do a full, a cached and a dynamic step on inputs that differ a little; undo them all.

    Args:
        request: whose step it is; put back as it was at the end, also after an exception.
        leaves: inputs of the step.
        step: does it on inputs like `leaves`; returns the leaves of the output.

    Returns:
        what `step` returned, per step in the order of `TRIED`.
    """
    copies, results = request.copies(), []
    try:
        for code, scale in zip(TRIED, (1.0, 1.0625, 1.125), strict=True):
            for lane in request.lanes():
                lane.force(code)
            results.append(step([_scaled(leaf, scale) for leaf in leaves]))
    finally:
        for copy in copies:
            copy.restore()
    return results


def _scaled(leaf: Any, scale: float) -> Any:
    """Return a tensor of numbers times `scale`, and all else as it is."""
    is_scaled = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf * scale if is_scaled else leaf


def compare(got: list[list[Any]], expected: list[list[Any]]) -> None:
    """Raise a RuntimeError if replayed steps differ from eager ones."""
    for name, ours, theirs in zip(TRIED.values(), got, expected, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            if isinstance(x, torch.Tensor) and not _agree(x, y):
                raise RuntimeError(
                    f"a replayed {name} step must equal an eager one, but does not: the "
                    f"forward depends on something that its inputs do not show"
                )


def _agree(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two results are equal, or as near as kernels are that add in no fixed order."""
    if torch.equal(x, y):
        return True
    tolerance = TOLERANCES.get(x.dtype, TOLERANCE)
    x, y = x.double().nan_to_num(), y.double().nan_to_num()
    return bool((x - y).norm() <= tolerance * y.norm())
