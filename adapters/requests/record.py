"""What is kept of a request when it closes: for the summary, read from the device when shown."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from dbcache.results.lane import LaneSummary

Times = tuple[Any, Any]
"""Begin and end of a forward: seconds, or events of the device."""

TIMES = "_times"
"""Attribute of a request with the times of its forwards by branch, while they are profiled."""

PENDING = 8
"""Closed requests whose numbers stay on the device; older ones are read, and added up."""


class RequestRecord:
    """The lanes of one request, as they were when this was made.

    Args:
        lanes: make the summary of each lane, None for one that took no step.
        notes: what the summary should say beside them.
        calls: forwards of the request.
    """

    def __init__(
        self, lanes: list[Callable[[], LaneSummary | None]], notes: list[str], calls: int
    ) -> None:
        self._read = lanes
        self.notes = notes
        self.calls = calls
        self._lanes: list[LaneSummary] | None = None

    @classmethod
    def of(cls, request: Any) -> RequestRecord:
        """Return the record of a request as it stands."""
        setup, name = request.setup, type(request.module).__name__
        notes = [f"{stack.name}: all {stack.num_blocks} blocks run on every step"
                 for stack in setup.stacks if not stack.entries]  # fmt: skip
        notes += [f"{name}: {note}" for note in request.notes()]
        runs = [] if request.lane_set is None else request.lane_set.runs
        lanes = []
        for run in runs:
            keys = [branch for branch, lane in run.lanes.items() if lane.steps.step]
            for branch in run.lanes:
                shown = request.clock.branches.shown(branch, keys)
                times = getattr(request, TIMES, {}).get(branch, [])
                lanes.append(_lane(name, run, branch, shown, list(times)))
        return cls(lanes, notes, request.clock.calls)

    def lanes(self) -> list[LaneSummary]:
        """Return the summaries of the lanes that took a step; reads them from the device, once."""
        if self._lanes is None:
            self._lanes = [lane for read in self._read if (lane := read()) is not None]
            self._read = []
        return self._lanes


def _lane(
    transformer: str, run: Any, branch: str | None, shown: str | None, times: list[Times]
) -> Callable[[], LaneSummary | None]:
    """Return a function that makes the summary of a lane as it is now."""
    lane, stack, cache = run.lanes[branch], run.stack, run.settings.cache
    trace, pruned, nbytes = lane.steps.snapshot(), stack.pruned_blocks(lane), lane.nbytes()

    def read() -> LaneSummary | None:
        reasons, changes = trace()
        if not reasons:
            return None
        return LaneSummary.from_trace(
            reasons,
            changes,
            transformer=transformer,
            stack=stack.name,
            branch=shown,
            threshold=cache.threshold,
            policy=cache.policy,
            follows=None if stack.leader is None else stack.leader.name,
            megabytes=nbytes / 1e6,
            pruned=None if pruned is None else pruned(),
            blocks=stack.num_blocks,
            always=stack.fn + stack.bn,
            options=cache.as_dict(),
            seconds=list(map(_seconds, times)) if len(times) == len(reasons) else [],
        )

    return read


def _seconds(times: Times) -> float:
    """Return what a forward took; waits for the device where it took the time."""
    begin, end = times
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


class Totals:
    """What all closed requests of one transformer add up to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[RequestRecord] = deque()
        self._sums: Counter[str] = Counter()

    def add(self, record: RequestRecord) -> None:
        """Add a closed request; one without a forward does not count."""
        if not record.calls:
            return
        with self._lock:
            self._pending.append(record)
            if len(self._pending) > PENDING:
                self._count(self._pending.popleft())

    def _count(self, record: RequestRecord) -> None:
        lanes = record.lanes()
        self._sums["requests"] += 1
        self._sums["requests_without_cached_steps"] += not any(x.cached_steps for x in lanes)
        self._sums["steps"] += sum(lane.steps for lane in lanes)
        self._sums["cached_steps"] += sum(len(lane.cached_steps) for lane in lanes)
        for lane in lanes:
            for reason, count in lane.counts.items():
                self._sums[f"reason: {reason}"] += count

    def read(self) -> dict[str, int]:
        """Return requests, steps, cached steps and how often each reason was given."""
        with self._lock:
            while self._pending:
                self._count(self._pending.popleft())
            return dict(self._sums)
