"""What another threshold would have cached, replayed from the changes that a request recorded.

An estimate: a step that is cached where it was full, or the other way round, also changes what
later steps are compared with. Steps that measured no change are decided as they were.
"""

from __future__ import annotations

import math

from dbcache.kernels.common.lane_state import Reason
from dbcache.results.lane import CACHED, REASONS, LaneSummary

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Thresholds that are replayed, over the one that was set."""

FIXED = frozenset(
    REASONS[reason]
    for reason in (
        Reason.WARMUP, Reason.MASK, Reason.NO_REFERENCE, Reason.SHAPE_CHANGED, Reason.NAN,
        Reason.STATIC,
    )
)  # fmt: skip
"""Reasons that no threshold changes."""


def replayed(lane: LaneSummary, threshold: float) -> list[int]:
    """Return the steps that a threshold would have cached, with the limits as they were set."""
    options = lane.options
    most = options.get("max_cached_steps", -1)
    in_a_row = options.get("max_continuous_cached_steps", -1)
    accumulated = options.get("max_accumulated_residual_diff_threshold") or math.inf
    cached: list[int] = []
    row, total = 0, 0.0
    for step, reason in enumerate(lane.reasons):
        diff = lane.diffs.get(step)
        if reason in FIXED or diff is None:
            takes = reason in CACHED
        else:
            allowed = (most < 0 or len(cached) < most) and (in_a_row < 0 or row < in_a_row)
            total += diff
            below = total if lane.policy != "dbcache" else diff
            takes = allowed and total - diff < accumulated and threshold > 0 and below < threshold
            takes = takes or (allowed and threshold >= 1 and lane.policy == "dbcache")
        if takes:
            cached.append(step)
            row += 1
        else:
            row, total = 0, 0.0
    return cached


def estimates(lane: LaneSummary) -> list[tuple[float, int]]:
    """Return thresholds around the one that was set, and how many steps each would have cached.

    None where nothing was compared, or single blocks were.
    """
    if lane.pruned is not None or lane.follows or not lane.diffs:
        return []
    base = lane.threshold
    if not 0 < base < 1:  # always or never: the recorded changes tell which thresholds matter
        base = sorted(lane.diffs.values())[len(lane.diffs) // 2] or 0.08
    thresholds = sorted({float(f"{base * factor:.3g}") for factor in FACTORS} | {lane.threshold})
    return [(threshold, len(replayed(lane, threshold))) for threshold in thresholds]
