"""A forward as segments, cut where the cache decides; what the stacks tell, and how it replays.

    pre | full body or cached body | between | full body or cached body | post

The model's own loop runs once, through the guards, as on a full step. The stacks call a `Cutter` at
three places: a decision is on the device (`begin_full`), the blocks have run and were stored
(`begin_cached`), their replacement was predicted into the very tensors in which the blocks left
their output (`end_branch`). So both bodies leave the same tensors behind, and what follows does not
know which of them ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dbcache.kernels.common.lane_state import PlanCode
from dbcache.lanes.decision import Decision
from dbcache.lanes.lane_copy import AnyLane, StepCopy


class Segment(Protocol):
    """Recorded work."""

    raw: int | None
    """Address of its graph (a `cudaGraph_t`), None if it is empty."""

    def replay(self) -> None:
        """Do the work again, on the current stream."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Two segments, one of which runs."""

    name: str
    decision: Decision
    full: Segment
    cached: Segment


Program = Sequence[Segment | Branch]


class Cutter(Protocol):
    """What a block stack tells while its forward is recorded."""

    fixed_by_plan: bool
    """Steps are recorded one by one: what the plan fixes needs no branch."""

    def begin_full(self, decision: Decision, name: str) -> None:
        """What follows belongs to the full body; the decision was put on the device."""

    def begin_cached(self) -> None:
        """What follows belongs to the cached body."""

    def end_branch(self) -> None:
        """What follows runs on every step."""

    def abort(self) -> None:
        """Leave off after an exception, whatever was begun."""


class Recordable(Protocol):
    """What the executor needs of a request on a transformer."""

    @property
    def branch(self) -> str | None:
        """Guidance branch of the step under way."""

    lane_set: Any
    """All that the request keeps on the device, which no other request has meanwhile."""

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cutter: Cutter | None = None
    ) -> Any:
        """Run one step eagerly, or while a `cutter` records it."""

    def kind_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...]:
        """Return what the host reads of a call's tensors; recorded work holds for that alone."""

    def lanes(self) -> list[AnyLane]:
        """Return the lanes of the step under way, in the order of the stacks."""

    def copies(self) -> list[StepCopy]:
        """Return copies of all that the step under way changes."""


class SegmentCutter:
    """Makes a program of what one forward does from now on.

    Args:
        recorder: makes the segments, as `CudaRecorder` does: what happens between its `begin` and
            `end` is recorded, not done.
    """

    fixed_by_plan = False

    def __init__(self, recorder: Any) -> None:
        self.recorder = recorder
        self.program: list[Segment | Branch] = []
        self._branch: Any = None
        self._full: Any = None
        recorder.begin()

    def begin_full(self, decision: Decision, name: str) -> None:
        self.program.append(self._cut())
        self._branch = name, decision

    def begin_cached(self) -> None:
        self._full = self._cut()

    def end_branch(self) -> None:
        name, decision = self._branch
        self.program.append(Branch(name, decision, self._full, self._cut()))

    def _cut(self) -> Segment:
        """Finish a segment and start the next one."""
        segment: Segment = self.recorder.end()
        self.recorder.begin()
        return segment

    def finish(self) -> None:
        """Finish the last segment."""
        self.program.append(self.recorder.end())

    def abort(self) -> None:
        self.recorder.abort()


class HostReplay:
    """Replays the segments one by one; the host reads each decision that it does not know."""

    mode = "host"

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self) -> None:
        for item in self.program:
            if isinstance(item, Branch):
                (item.cached if item.decision.read() else item.full).replay()
            else:
                item.replay()

    def close(self) -> None:
        """Free what belongs to it: nothing but the segments."""


class DeviceReplay:
    """Replays a program as one graph, whose branches are taken on the device.

    Args:
        program: what was recorded; kept, as its segments own the memory.
        recorder: made the segments, for a GPU that has a `driver`.

    Raises:
        RuntimeError: a body holds what may not be in one, or the driver refuses.
    """

    mode = "device"

    def __init__(self, program: Program, recorder: Any) -> None:
        self.program = program
        self.recorder = recorder
        self.driver = recorder.driver
        self.executable: Any = None
        self.graph = self.driver.create_graph()
        try:
            with recorder.on_device():
                self._assemble()
                self.executable = self.driver.instantiate(self.graph)
        except BaseException:
            self.close()
            raise

    def _assemble(self) -> None:
        after: list[Any] = []
        for item in self.program:
            if isinstance(item, Branch):
                for body in (item.full, item.cached):
                    if body.raw is not None:
                        self.driver.check_body(body.raw, item.name)
                flag = item.decision.flag.data_ptr()
                after = [
                    self.driver.add_branch(self.graph, after, flag, item.full.raw, item.cached.raw)
                ]
            elif item.raw is not None:
                after = [self.driver.add_child(self.graph, after, item.raw)]

    def __call__(self) -> None:
        with self.recorder.on_device():
            self.driver.launch(self.executable, self.recorder.current_stream())
        for item in self.program:
            if isinstance(item, Branch):
                item.decision.count()

    def close(self) -> None:
        """Free the graph."""
        self.driver.destroy(self.graph, self.executable)
        self.graph = self.executable = None


Replay = HostReplay | DeviceReplay


def replay_of(program: Program, mode: str, recorder: Any, lanes: Sequence[AnyLane]) -> Replay:
    """Return what replays a program in a mode.

    Where the plans of all lanes leave nothing open, the host knows which way each step goes, and
    strings the segments together without waiting: a branch in the graph would have nothing to ask.
    """
    if mode == "device" and any(PlanCode.DYNAMIC in lane.steps.plan for lane in lanes):
        return DeviceReplay(program, recorder)
    return HostReplay(program)
