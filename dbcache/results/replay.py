"""What another threshold would have cached, replayed from the changes that a request recorded.

An estimate: a step that is cached where it was full, or the other way round, also changes what
later steps are compared with. Steps that measured no change are decided as they were.
"""

from __future__ import annotations

import math

from dbcache.kernels.common.lane_state import Reason
from dbcache.results.lane import CACHED, REASONS, LaneSummary

FACTORS = (0.5, 1.5, 2.0)
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Thresholds that are replayed: over the one that was set, and that let these shares of the changes
pass."""

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
    finite = sorted(diff for diff in lane.diffs.values() if math.isfinite(diff))
    found = {1.01 * finite[math.ceil(share * len(finite)) - 1] for share in SHARES if finite}
    if 0 < lane.threshold < 1:
        found |= {lane.threshold * factor for factor in FACTORS}
    thresholds = sorted({float(f"{one:.3g}") for one in found if one > 0} | {lane.threshold})
    return [(threshold, len(replayed(lane, threshold))) for threshold in thresholds]
