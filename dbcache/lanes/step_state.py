"""The steps of one lane: their plan, the counters on the device, and what the host knows of them.

All decisions are taken on the device. The host reads one only where plan, limits or a missing
reference do not say it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch

from dbcache.config.cache import StackSettings
from dbcache.config.policies import POLICIES
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState, PlanCode
from dbcache.lanes.buffers import HostCopy, outside_inference_mode
from dbcache.lanes.plan import decide_ahead, make_plan
from dbcache.lanes.scheduled import scheduled_plan

DYNAMIC = PlanCode.DYNAMIC
FIRST_CAPACITY = 64
"""Steps that a lane has room for at first; it grows when a request is longer."""

Trace = tuple[list[int], list[float]]
"""Reasons and changes of the steps of a request."""

State = TypeVar("State", bound=LaneState)


class StepState(Generic[State]):
    """The position of a lane in its request.

    Args:
        state: on the device, of a request that has not begun.
        branch: of guidance; a calibration may differ between branches.

    Attributes:
        state: the scalars that `decide` goes by.
        plan: what is known of each step before the request: plan codes, or `KNOWN` plus a reason.
        step: number of the next step; after `settle` or `count`, steps so far.
        has_reference: a full step has left behind what later ones need.
        is_first: nothing was stored yet when the step under way began.
        cached: how the latest step was decided, as far as the host knows.
        limits: those of `state`, on the host; `thresholds` likewise.
        counts: cached steps of the request, and those since the last full one; None: only the
            device knows.
    """

    HOST = ("step", "has_reference", "cached", "counts", "plan")
    """What the host keeps of a request."""

    def __init__(self, state: State, branch: str | None = None) -> None:
        self.branch: str | None = branch
        self.plan: list[int] = []
        self._bind(state)
        self.limits: list[int] = self.state.limits.tolist()
        self.thresholds: list[float] = self.state.thresholds.tolist()
        self._forget_request()

    def _bind(self, state: State) -> None:
        self.state: State = state
        self.device = state.counters.device
        self._host = HostCopy()

    @outside_inference_mode
    def load(
        self,
        settings: StackSettings,
        limits: Mapping[int, int],
        thresholds: Mapping[int, float],
    ) -> None:
        """Write limits, thresholds (by entry) and the plan to the device."""
        self.limits = _write(self.state.limits, self.limits, limits)
        self.thresholds = _write(self.state.thresholds, self.thresholds, thresholds)
        self.replan(settings)

    @outside_inference_mode
    def replan(self, settings: StackSettings) -> None:
        """Write the plan of `settings` to the device."""
        self._settings = settings
        plan: list[int] = [
            *make_plan(settings.cache, self.state.capacity, settings.steps, settings.loop)
        ]
        self._known_changes: dict[int, float] = {}
        if settings.calibration is not None and settings.calibration.lanes:
            plan = [*scheduled_plan(settings, self.branch, self.state.capacity)]
        elif POLICIES[settings.cache.policy].measures == "calibration":
            assert settings.calibration is not None
            ratios = settings.calibration.ratios_for(self.branch, settings.steps)
            plan, self._known_changes = decide_ahead(plan, ratios, self.limits, self.thresholds)
        self.plan = plan
        self.state.plan.copy_(torch.tensor(plan, dtype=torch.int32, device="cpu"))

    @outside_inference_mode
    def reserve(self, steps: int) -> None:
        """Make room for a request of `steps` steps."""
        if steps > len(self.plan):
            self.state.grow(steps)
            self.replan(self._settings)

    def start_request(self) -> None:
        """Forget the last request."""
        self._forget_request()
        self.state.reset()

    def _forget_request(self) -> None:
        self.step = 0
        self.has_reference = self.cached = False
        self.is_first = True
        self.counts: tuple[int, int] | None = (0, 0)

    def begin(self, changed: bool, device: torch.device) -> int:
        """Make room for the next step on `device`; return its plan code.

        Args:
            changed: the layout of the step is not that of the last one.
            device: of the step.
        """
        if device != self.device:
            self._move(device)
        if changed:
            self.invalidate()
        self.is_first = not self.has_reference
        if self.step >= len(self.plan):
            self.reserve(2 * len(self.plan))
        return self.plan[self.step]

    @outside_inference_mode
    def _move(self, device: torch.device) -> None:
        self._bind(self.state.clone(device))

    def settle(self, code: int, flag: bool | None = None) -> bool:
        """Count a step that the device decides; return the decision.

        Args:
            code: the step's plan code, or `KNOWN` plus the reason.
            flag: the decision, where it was read already.
        """
        if not self.has_reference:
            return self.advance(False)
        if code != DYNAMIC:
            return self.advance(ls.PLANNED[code] >= ls.FIRST_CACHED)
        return self.advance(self.read_flag() if flag is None else flag)

    def read_flag(self) -> bool:
        """Return whether the device decided to cache. The only host wait of a dynamic step."""
        if self.state.host is not None:
            return bool(self.state.host[0][ls.CACHED])
        return bool(self._host.read(self.flag()))

    def start_read(self) -> Callable[[], torch.Tensor]:
        """Enqueue what `read_flag` waits for, on a GPU; return what waits, and returns the flag."""
        return self._host.start(self.flag())

    def flag(self) -> torch.Tensor:
        """Return the latest decision on the device, int32 (1,): 1 cached, 0 full."""
        return self.state.counters[ls.CACHED : ls.CACHED + 1]

    def advance(self, cached: bool) -> bool:
        """Count a step that the host knows to be `cached` or full; return `cached`."""
        self.step += 1
        self.cached = cached
        if self.counts is not None:
            total, in_a_row = self.counts
            self.counts = total + cached, (in_a_row + 1) * cached
        return cached

    def read(self) -> bool:
        """Count a replayed step and return how it was decided; it leaves a reference."""
        cached = self.settle(self.plan[self.step])
        self.has_reference = True
        return cached

    def count(self) -> None:
        """Count a replayed step; the host does not learn how it was decided."""
        self.step += 1
        self.has_reference = True
        self.cached, self.counts = False, None

    def learn_counts(self) -> tuple[int, int]:
        """Return `counts`, read from the device after steps that the host did not follow."""
        if self.counts is None:
            counters = self.state.counters.tolist()
            self.counts = counters[ls.CACHED_STEPS], counters[ls.CONSECUTIVE]
        return self.counts

    def force(self, code: int) -> None:
        """Fix the plan code of the next step."""
        self.plan[self.step] = code
        self.state.plan[self.step] = code

    def invalidate(self) -> None:
        """Make the next step a full one, since the layout changed."""
        if self.has_reference:
            self.state.invalidate()
            self.has_reference = False

    def forget(self) -> None:
        """Make the next step a full one: everything stored is void."""
        self.has_reference = False
        self.state.invalidate()
        self.state.counters[ls.REFERENCE] = 0

    def rewind(self, step: int) -> None:
        """Go back to `step` after an exception; later steps count as never begun."""
        self.step, self.counts = step, None
        self.forget()
        self.state.counters[ls.STEP] = step

    def abort(self) -> None:
        """Undo a step after an exception: the step counts as never begun."""
        self.rewind(self.step - 1)
        if self.cached:
            self.state.counters[ls.CACHED_STEPS] -= 1

    @outside_inference_mode
    def snapshot(self) -> Callable[[], Trace]:
        """Return what reads back the reasons and the changes (-1: not measured) of all steps.

        Under DBPrune a change is the smallest one of a block that may be left out. Enqueues copies,
        without waiting.
        """
        state, known = self.state, self._known_changes
        # a graph that the user captured takes steps that the host does not see
        counters = state.counters.clone()
        reasons, diffs = state.trace_reason.clone(), state.trace_diff.clone()

        def read() -> Trace:
            steps = int(counters[ls.STEP])
            changes = diffs[:steps].tolist()
            for step, change in known.items():
                if step < steps:
                    changes[step] = change
            return reasons[:steps].tolist(), changes

        return read


def _write(tensor: torch.Tensor, known: list[Any], entries: Mapping[int, float]) -> list[Any]:
    """Write a tensor, of which the host knows the content, with other `entries`; return all."""
    values = torch.tensor(known, dtype=tensor.dtype, device="cpu")
    for entry, value in entries.items():
        values[entry] = value
    tensor.copy_(values)
    return list(values.tolist())
