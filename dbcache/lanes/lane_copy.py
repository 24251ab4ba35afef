"""A copy of a lane, to go back to after a trial."""

from __future__ import annotations

from copy import copy

from dbcache.lanes.buffers import outside_inference_mode
from dbcache.lanes.lane import Lane
from dbcache.lanes.pruned_lane import PrunedLane

AnyLane = Lane | PrunedLane
"""A lane that caches whole steps, or leaves out single blocks."""


class LaneCopy:
    """A copy of all that a step changes, to be written back into the same tensors."""

    @outside_inference_mode
    def __init__(self, lane: AnyLane) -> None:
        self.lane = lane
        self.host = {name: copy(getattr(lane.steps, name)) for name in lane.steps.HOST}
        self.buffers = {k: x.clone() for k, x in lane.buffers_by_name().items() if x is not None}
        self.small = [(x, x.clone()) for x in (*lane.state.tensors(), *lane.learned())]

    @outside_inference_mode
    def restore(self) -> None:
        """Put everything back."""
        for name, value in self.host.items():
            setattr(self.lane.steps, name, value)
        held = self.lane.buffers_by_name()
        pairs = ((held.get(name), content) for name, content in self.buffers.items())
        for tensor, content in (*self.small, *pairs):
            if tensor is not None:
                tensor.copy_(content)
