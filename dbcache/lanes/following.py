"""A lane that takes the decisions of another one: later block stacks of a model may have no probe.

It has rings of its own and shares the other lane's state on the device: the decision, the weights
and the slot to write are those of the leader, without a launch and without waiting.
"""

from __future__ import annotations

import torch

from dbcache.config.cache import StackSettings
from dbcache.kernels.common.lane_state import CACHED, Reason
from dbcache.lanes.lane import Lane, Layout


class FollowingLane(Lane):
    """Rings of one lane under the decisions of `leader`, the lane of another block stack.

    A step that the leader caches is full here where nothing was stored that fits: the shapes
    changed, or this stack was left out of the step before. The leader then starts anew at the next
    step, so that all rings hold the same steps again.
    """

    compares = False

    def __init__(self, settings: StackSettings, leader: Lane) -> None:
        super().__init__(settings, leader.device, leader.state)
        self.by_residual = False
        self.leader = leader
        self._leader_layout: Layout | None = None
        self._overruled: dict[int, Reason] = {}

    def start_request(self) -> None:
        """Forget the last request; the leader resets the state."""
        self.step = 0
        self.has_reference = self.cached = False
        self._overruled.clear()
        self._forget_tail()

    def follow(self, layout: Layout, device: torch.device) -> bool:
        """Take over the decision that the leader took in this step; return it.

        Raises:
            ValueError: the blocks are on another device than the leader's state.
        """
        leader = self.leader
        if device != leader.device:
            raise ValueError(
                f"decision_scope='model': all stacks must be on one device, got {device} and "
                f"{leader.device}; use decision_scope='stack'"
            )
        self.state = leader.state
        if device != self.device:
            self._move_rest(device)
        missed = self.step != leader.step - 1
        changed = layout != self.layout
        if changed:
            self.set_buffers({})
            self.layout = layout
        # a leader whose own layout changed in this step, or in its first one, starts anew already
        is_alone = leader.step > 1 and (missed or leader.layout == self._leader_layout)
        self._leader_layout = leader.layout
        self.step = leader.step
        self.cached = leader.cached
        if missed or changed:
            if leader.cached:
                reason = Reason.SHAPE_CHANGED if changed else Reason.NO_REFERENCE
                self._overruled[self.step - 1] = reason
                self.cached = False
            if is_alone or leader.cached:
                leader.forget_reference()
        return self.cached

    def replan(self, settings: StackSettings) -> None:
        """Take over settings that differ in the mask; the plan is the leader's."""
        self.settings = settings
        if self.forecaster is not None:
            self.forecaster.replan(settings.steps)

    @property
    def plan(self) -> list[int]:  # type: ignore[override]
        """The leader's plan."""
        return self.leader.plan

    def reload(self, settings: StackSettings) -> None:
        """Take over settings; but for the last blocks, what lies on the device is the leader's."""
        self.settings = settings
        if self.tail is not None:
            self.tail.reload(settings)

    def take_buffers(self, layout: Layout, buffers: dict[str, torch.Tensor | None]) -> None:
        """Go on with the rings of another layout; what they hold is void, and so are the leader's.

        All rings hold the same steps, so the step that begins is a full one for all.
        """
        if self.has_reference:
            self.leader.has_reference = False
        super().take_buffers(layout, buffers)

    def reserve(self, steps: int) -> None:
        """Nothing: the leader makes room."""

    def force(self, code: int) -> None:
        """The leader decides; the last blocks are as on such a step."""
        if self.tail is not None:
            self.tail.force(code)

    def rewind(self, step: int) -> None:
        """Go back to `step`; the leader does the rest."""
        self.step = step
        self._forget_tail()

    def forget_reference(self) -> None:
        """Make the leader's next step a full one: what is stored here does not hold any more."""
        self.leader.forget_reference()
        self._forget_tail()

    def abort_step(self) -> None:
        """Undo a step that an exception cut short; the leader does the rest."""
        self.step -= 1
        self._forget_tail()

    def trace(self) -> tuple[list[int], list[float]]:
        """Return the leader's reasons but for overruled steps; nothing is measured here."""
        reasons, _ = self.leader.trace()
        if self.step != self.leader.step:  # it was left out since
            reasons = reasons[: self.step]
        for step, reason in self._overruled.items():
            reasons[step] = reason
        return reasons, [-1.0] * len(reasons)


class FollowedDecision:
    """The leader's decision, for recorded work; see `executors.recording.Decision`."""

    def __init__(self, lane: FollowingLane) -> None:
        self.lane = lane
        self.flag = lane.state.counters[CACHED : CACHED + 1]

    def read(self) -> bool:
        """Return what the leader has read."""
        self.lane.step = self.lane.leader.step
        self.lane.cached = self.lane.leader.cached
        return self.lane.cached

    def has_run(self, cached: bool) -> None:
        """A full step has left something to predict from."""
        if not cached:
            self.lane.has_reference = True

    def count(self) -> None:
        """Count the step, after the leader has; full or cached, it leaves a reference."""
        self.read()
        self.lane.has_reference = True
