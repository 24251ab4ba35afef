"""The steps of a lane without a probe, which follows the decisions of another lane.

The lane has a history of its own and shares the leader's state on the device: the decision, the
weights and the slot to write are those of the leader, without a launch and without waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from dbcache.config.cache import StackSettings
from dbcache.kernels.common.lane_state import LaneState, Reason
from dbcache.lanes.buffers import Layout
from dbcache.lanes.step_state import StepState, Trace


class Leader(Protocol):
    """The lane of another block stack, which takes the decisions."""

    device: torch.device
    layout: Layout | None

    @property
    def steps(self) -> StepState[LaneState] | FollowedSteps:
        """The leader's own steps."""

    def forget_reference(self) -> None:
        """Make the next step a full one."""


class FollowedSteps:
    """The steps of `leader`, as another lane follows them; used like a `StepState`.

    A step that the leader caches is full here where nothing was stored that fits: the shapes
    changed, or this stack was left out of the step before. The leader then starts anew at the next
    step, so that all histories hold the same steps again.
    """

    HOST = ("step", "has_reference", "cached")

    def __init__(self, leader: Leader) -> None:
        self.leader = leader
        self._leader_layout: Layout | None = None
        self._overruled: dict[int, Reason] = {}
        self.start_request()

    @property
    def state(self) -> LaneState:
        """The scalars of the leader."""
        return self.leader.steps.state

    @property
    def plan(self) -> list[int]:
        """The plan of the leader."""
        return self.leader.steps.plan

    @property
    def is_first(self) -> bool:
        """Whether the leader had stored nothing when the step began."""
        return self.leader.steps.is_first

    def start_request(self) -> None:
        """Forget the last request; the leader resets the state."""
        self.step = 0
        self.has_reference = self.cached = False
        self._overruled.clear()

    def begin(self, changed: bool, device: torch.device) -> int:
        """Follow the leader's decision of this step; return the plan code of the step.

        Raises:
            ValueError: the blocks are on another device than the leader's state.
        """
        leader, steps = self.leader, self.leader.steps
        if device != leader.device:
            raise ValueError(
                f"decision_scope='model': all stacks must be on one device, got {device} and "
                f"{leader.device}; use decision_scope='stack'"
            )
        missed = self.step != steps.step - 1
        # a leader whose own layout changed in this step, or in its first one, starts anew already
        is_alone = steps.step > 1 and (missed or leader.layout == self._leader_layout)
        self._leader_layout = leader.layout
        self.follow()
        if missed or changed:
            if steps.cached:
                reason = Reason.SHAPE_CHANGED if changed else Reason.NO_REFERENCE
                self._overruled[self.step - 1] = reason
                self.cached = False
            if is_alone or steps.cached:
                leader.forget_reference()
        return self.plan[self.step - 1]

    def settle(self, code: int, flag: bool | None = None) -> bool:
        """Return the decision, which `begin` has found."""
        return self.cached

    def flag(self) -> torch.Tensor:
        """Return the leader's decision on the device, int32 (1,)."""
        return self.leader.steps.flag()

    def follow(self) -> None:
        """Take over the step that the leader has counted."""
        self.step, self.cached = self.leader.steps.step, self.leader.steps.cached

    def read(self) -> bool:
        """Count a replayed step, after the leader has; return how it was decided, if known."""
        self.follow()
        self.has_reference = True  # full or cached, it leaves one
        return self.cached

    count = read

    def replan(self, settings: StackSettings) -> None:
        """Do nothing: the plan is the leader's."""

    def reserve(self, steps: int) -> None:
        """Do nothing: the leader makes room."""

    def force(self, code: int) -> None:
        """Do nothing: the leader decides."""

    def invalidate(self) -> None:
        """Make the next step a full one of all lanes, since the layout changed here.

        All histories hold the same steps.
        """
        if self.has_reference:
            self.leader.steps.has_reference = self.has_reference = False
            self.state.invalidate()

    def forget(self) -> None:
        """Make the leader's next step a full one: this history is void."""
        self.leader.forget_reference()

    def rewind(self, step: int) -> None:
        """Go back to `step`; the leader does the rest."""
        self.step, self.has_reference = step, False

    def abort(self) -> None:
        """Undo a step that an exception cut short; the leader does the rest."""
        self.step -= 1

    def snapshot(self) -> Callable[[], Trace]:
        """Return what reads back the leader's reasons, those of overruled steps, and no changes."""
        leaders, overruled = self.leader.steps.snapshot(), dict(self._overruled)
        was_left_out, steps = self.step != self.leader.steps.step, self.step

        def read() -> Trace:
            reasons, _ = leaders()
            if was_left_out:
                reasons = reasons[:steps]
            for step, reason in overruled.items():
                reasons[step] = reason
            return reasons, [-1.0] * len(reasons)

        return read
