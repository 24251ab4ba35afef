"""The guard of a schedule: each cached step has a threshold of its own for the change since the
last full step, EasyCache's sum. A request that moves more than that runs the step in full.
"""

from __future__ import annotations

import torch

from dbcache.config.cache import StackSettings
from dbcache.config.scheduled_lane import MAX_STEPS
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState

NO_LIMIT = 3e38
"""Threshold of steps of which the schedule does not know the change."""


class Guard:
    """The thresholds of a lane, by step, on the device.

    Args:
        settings: with the lane's schedule; `residual_diff_threshold` times the change that the
            schedule has seen is what a step may move.
        device: of the lane.
        branch: of guidance.
    """

    def __init__(self, settings: StackSettings, device: torch.device, branch: str | None) -> None:
        self._branch = branch
        self._thresholds = torch.full((MAX_STEPS,), NO_LIMIT, device=device)
        self.replan(settings)

    def replan(self, settings: StackSettings) -> None:
        """Take the thresholds of other settings; the tensor stays where it is."""
        if settings.calibration is None:
            return
        lane, factor = settings.calibration.lane_for(self._branch), settings.cache.threshold
        by_step = [
            min(factor * lane.changes[i], NO_LIMIT) if i in lane.changes else NO_LIMIT
            for i in range(len(lane.mask))
        ]
        self._thresholds.fill_(NO_LIMIT)
        self._thresholds[: len(by_step)].copy_(torch.tensor(by_step))

    def arm(self, state: LaneState) -> None:
        """Put the threshold of the next step in place, on the device."""
        step = state.counters[ls.STEP : ls.STEP + 1]
        entry = state.thresholds[ls.THRESHOLD : ls.THRESHOLD + 1]
        torch.index_select(self._thresholds, 0, step.clamp_max(MAX_STEPS - 1), out=entry)


def make_guard(settings: StackSettings, device: torch.device, branch: str | None) -> Guard | None:
    """Return the guard of a lane, None where its schedule has none."""
    if settings.cache.policy != "guarded_schedule" or settings.calibration is None:
        return None
    return Guard(settings, device, branch)
