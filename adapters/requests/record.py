"""What is kept of a request when it closes: for the summary, read from the device when shown."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from dbcache.adapters.requests import clock as clocks
from dbcache.notices import nothing_cached
from dbcache.results.lane import LaneSummary

Times = tuple[Any, Any]
"""Begin and end of a forward: seconds, or events of the device."""

TIMES = "_times"
"""Attribute of a request with the times of its forwards by branch, while they are profiled."""

BLOCKS = (
    "{stack}: all {blocks} blocks run on every step, so nothing is cached; lower "
    "Fn_compute_blocks or Bn_compute_blocks (now {fn} and {bn})"
)
PENDING = 8
"""Closed requests whose numbers stay on the device; older ones are read, and added up."""


class RequestRecord:
    """The lanes of one request, as they were when this was made.

    Args:
        lanes: make the summary of each lane, None for one that took no step.
        notes: what the summary should say beside them.
        calls: forwards of the request.

    Attributes:
        tally: what says it where the lanes, once they are read, have cached nothing; None where
            nothing is to be said.
    """

    def __init__(
        self, lanes: list[Callable[[], LaneSummary | None]], notes: list[str], calls: int
    ) -> None:
        self._read = lanes
        self.notes = notes
        self.calls = calls
        self.tally: Any = None
        self._lanes: list[LaneSummary] | None = None

    @classmethod
    def of(cls, request: Any) -> RequestRecord:
        """Return the record of a request as it stands; another thread may be in its steps."""
        name = type(request.module).__name__
        said = [text for kind, text in request.notices.texts.copy().items() if kind != "blocks"]
        notes = all_run(request.setup) + said + [f"{name}: {note}" for note in _remarks(request)]
        lanes = []
        for run in request.lane_set.runs:
            own = run.lanes.copy()
            keys = [branch for branch, lane in own.items() if lane.steps.step]
            for branch, lane in own.items():
                shown = request.clock.branches.shown(branch, keys)
                of_branch = (branch or "").partition("[")[0] or None  # without the row of a batch
                times = getattr(request, TIMES, {}).get(of_branch, [])
                lanes.append(_lane((name, request.part), run, lane, shown, list(times)))
        return cls(lanes, notes, request.clock.calls)

    def lanes(self) -> list[LaneSummary]:
        """Return the summaries of the lanes that took a step; reads them from the device, once."""
        unread = self._read  # before the lanes: another thread empties it after these are there
        if self._lanes is None:
            self._lanes = [lane for read in unread if (lane := read()) is not None]
            self._read = []
            if self.tally is not None and self._lanes:
                for text in nothing_cached(self._lanes[0].owner, self._lanes):
                    self.tally.say("nothing cached", text)
        return self._lanes


def _remarks(request: Any) -> list[str]:
    """Return what the summary should say beside the lanes."""
    notes = []
    if request.loops > 1:
        notes.append(f"the pipeline denoised {request.loops} times, the last time is shown")
    if request.partial_calls:
        notes.append(f"{request.partial_calls} calls left blocks out and ran without the cache")
    forced = dict(request.forced)
    notes += [f"{count} steps were full since {why}" for why, count in forced.items() if count]
    return notes


def all_run(setup: Any) -> list[str]:
    """Return a text on each stack whose blocks all run on every step."""
    return [BLOCKS.format(**values_of(x)) for x in setup.stacks if not x.entries]


def values_of(stack: Any) -> dict[str, Any]:
    return {"stack": stack.name, "blocks": stack.num_blocks, "fn": stack.fn, "bn": stack.bn}


def _lane(
    of: tuple[str, str], run: Any, lane: Any, shown: str | None, times: list[Times]
) -> Callable[[], LaneSummary | None]:
    """Return a function that makes the summary of a lane as it is now."""
    stack, cache, predictor = run.stack, run.settings.cache, run.settings.predictor
    trace, pruned, nbytes = lane.steps.snapshot(), stack.pruned_blocks(lane), lane.nbytes()
    host_nbytes = lane.host_nbytes() if run.is_on_host else 0
    # records outlive the model: nothing of what is kept may lead to it
    name, blocks, always = stack.name, stack.num_blocks, stack.fn + stack.bn
    follows = None if stack.leader is None else stack.leader.name

    def read() -> LaneSummary | None:
        reasons, changes = trace()
        if not reasons:
            return None
        return LaneSummary.from_trace(
            reasons,
            changes,
            transformer=of[0],
            part=of[1],
            stack=name,
            branch=shown,
            threshold=cache.threshold,
            policy=cache.policy,
            follows=follows,
            megabytes=nbytes / 1e6,
            host_megabytes=host_nbytes / 1e6,
            pruned=None if pruned is None else pruned(),
            blocks=blocks,
            always=always,
            options=cache.as_dict(),
            short=f"{cache.strify()}_{predictor.strify()}",
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
        self._lock = threading.RLock()  # a signal's handler may ask, too
        self._pending: deque[RequestRecord] = deque()
        self._sums: Counter[str] = Counter()

    def add(self, record: RequestRecord) -> None:
        """Add a closed request; one without a forward does not count."""
        if not record.calls:
            return
        with self._lock:
            self._pending.append(record)
            while len(self._pending) > PENDING and not clocks.is_capturing():
                self._count(self._pending.popleft())

    def _count(self, record: RequestRecord) -> None:
        lanes = record.lanes()
        own = Counter(
            requests=1,
            requests_without_cached_steps=int(not any(x.cached_steps for x in lanes)),
            steps=sum(lane.steps for lane in lanes),
            cached_steps=sum(len(lane.cached_steps) for lane in lanes),
        )
        for lane in lanes:
            own.update({f"reason: {reason}": count for reason, count in lane.counts.items()})
        self._sums.update(own)

    def read(self) -> dict[str, int]:
        """Return requests, steps, cached steps and how often each reason was given."""
        with self._lock:
            while self._pending:
                self._count(self._pending.popleft())
            return dict(self._sums)
