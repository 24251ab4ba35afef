"""What computes weights in place of `decide`: the interface that a lane knows."""

from __future__ import annotations

import torch

from dbcache.config.cache import StackSettings
from dbcache.kernels.common.lane_state import LaneState

Snapshots = tuple[torch.Tensor, torch.Tensor | None]
"""The snapshots of hidden and of encoder states."""


class Forecaster:
    """What a lane asks of its predictor. By default there is nothing to do.

    Args:
        settings: of the stack.
        device: of the lane.
        branch: of guidance.
    """

    def __init__(self, settings: StackSettings, device: torch.device, branch: str | None) -> None:
        """Prepare what lies on the device."""

    def replan(self, settings: StackSettings) -> None:
        """Prepare for a request of the steps, and with the schedule, that `settings` have."""

    def learn(self, state: LaneState, stored: Snapshots, step: int, is_first: bool) -> None:
        """Learn from the full step just stored; `is_first`: nothing was stored before."""

    def weigh(self, state: LaneState, step: int) -> None:
        """Write the weights of the cached `step` over those of `decide`, where it has its own."""

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that it keeps on the device."""
        return []
