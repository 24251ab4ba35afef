"""A lane at one moment, to go back to."""

from __future__ import annotations

from dbcache.lanes.buffers import outside_inference_mode
from dbcache.lanes.lane import Lane
from dbcache.lanes.pruned_lane import PrunedLane

AnyLane = Lane | PrunedLane
"""A lane that caches whole steps, or leaves out single blocks."""


class LaneCopy:
    """What a lane held at one moment, to be put back into the same tensors."""

    @outside_inference_mode
    def __init__(self, lane: AnyLane) -> None:
        self.lane = lane
        self._restore_steps = lane.steps.copy()
        self.buffers = {k: x.clone() for k, x in lane.buffers_by_name().items() if x is not None}
        self.learned = [x.clone() for x in lane.learned()]

    @outside_inference_mode
    def restore(self) -> None:
        """Put everything back."""
        self._restore_steps()
        for name, buffer in self.lane.buffers_by_name().items():
            if buffer is not None and name in self.buffers:
                buffer.copy_(self.buffers[name])
        for tensor, content in zip(self.lane.learned(), self.learned, strict=True):
            tensor.copy_(content)
