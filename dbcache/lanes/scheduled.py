"""What a schedule says to a lane: the plan of its steps, the weights of cached ones, and a guard.

The guard gives each cached step a threshold of its own for the change since the last full step,
EasyCache's sum. A request that moves more than that runs the step in full.
"""

from __future__ import annotations

import torch

from dbcache.config.cache import StackSettings
from dbcache.config.scheduled_lane import MAX_STEPS
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import MAX_SLOTS, LaneState, PlanCode
from dbcache.kernels.prediction.scheduled_weights import scheduled_weights
from dbcache.lanes.forecaster import Forecaster

NO_LIMIT = 3e38
"""Threshold of steps of which the schedule does not know the change."""


def scheduled_plan(settings: StackSettings, branch: str | None, steps: int) -> list[PlanCode]:
    """Return the `PlanCode` of each of `steps` steps under a schedule; beyond it all are full."""
    assert settings.calibration is not None
    lane = settings.calibration.lane_for(branch)
    guarded = settings.cache.policy == "guarded_schedule"
    skip = PlanCode.DYNAMIC if guarded else PlanCode.STATIC
    plan = [PlanCode.MASK if entry else skip for entry in lane.mask[:steps]]
    return plan + [PlanCode.MASK] * (steps - len(plan))


class ScheduledWeights(Forecaster):
    """A table of weights, whose tensor stays where it is: recorded graphs read what is in it."""

    def __init__(self, settings: StackSettings, device: torch.device, branch: str | None) -> None:
        self._branch, self._slots = branch, settings.slots
        shape = MAX_STEPS, 2 * MAX_SLOTS
        self._table = torch.full(shape, -1.0, dtype=torch.float32, device=device)
        self._lane: object = None
        self.replan(settings)

    def replan(self, settings: StackSettings) -> None:
        if settings.calibration is None or not settings.calibration.lanes:
            return
        lane = settings.calibration.lane_for(self._branch)
        if lane != self._lane:
            self._lane = lane
            rows = torch.tensor(lane.table(self._slots), dtype=torch.float32, device="cpu")
            self._table.fill_(-1.0)
            self._table[: len(rows)].copy_(rows)

    def weigh(self, state: LaneState, step: int) -> None:
        scheduled_weights(state, self._table)

    def tensors(self) -> list[torch.Tensor]:
        return [self._table]


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
        self._thresholds = torch.full((MAX_STEPS,), NO_LIMIT, dtype=torch.float32, device=device)
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
        known = torch.tensor(by_step, dtype=torch.float32, device="cpu")
        self._thresholds[: len(known)].copy_(known)

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
