"""The lanes of a request, and those of closed requests, kept for the next ones."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from dbcache.adapters.stacks.stack_run import StackRun


class LaneSet:
    """All that a request keeps on the device, over all stacks of a transformer; reused as a whole.

    Args:
        runs: one per stack, in order.

    Attributes:
        serial: number that no other set has.
        is_captured: a graph of the user's works on the lanes, unseen by the host.
        shape: of the latents of the last request, for which the buffers fit.
    """

    _serials = itertools.count()

    def __init__(self, runs: Sequence[StackRun]) -> None:
        self.serial = next(self._serials)
        self.runs = list(runs)
        self.shape: object = None
        self.is_captured = False

    def start_request(self) -> None:
        """Forget the last request."""
        for run in self.runs:
            run.start_request()

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(lane.nbytes() for run in self.runs for lane in run.lanes.copy().values())


class LanePool:
    """Hands out sets of lanes: those of a closed request where they fit, else new ones.

    So buffers are reused, and recorded graphs with them. As many idle sets are kept as requests
    are open, and one where none is.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the collector may end a request at any time
        self._idle: list[tuple[Any, LaneSet]] = []
        self._out: weakref.WeakSet[LaneSet] = weakref.WeakSet()

    def take(self, stacks: Sequence[Any], shape: object, make: Callable[[], LaneSet]) -> LaneSet:
        """Return a set that no other request has, and that has forgotten the last one.

        Args:
            stacks: with their settings; a set fits whose buffers and kernels are the same.
            shape: of the latents; buffers for the same shape come first.
            make: makes a set where none fits.
        """
        kind = [stack.recorded for stack in stacks]
        with self._lock:
            fitting = [entry for entry in self._idle if entry[0] == kind]
            same = [entry for entry in fitting if entry[1].shape == shape]
            chosen = (same or fitting)[-1:]
            self._idle = [x for x in self._idle if not any(x is entry for entry in chosen)]
        lanes = chosen[0][1] if chosen else make()
        for run, stack in zip(lanes.runs, stacks, strict=True):
            run.serve(stack)
        lanes.shape = shape
        lanes.start_request()
        with self._lock:
            self._out.add(lanes)
        return lanes

    def give(self, lanes: LaneSet) -> None:
        """Take back the lanes of a request that was closed."""
        kind = [run.stack.recorded for run in lanes.runs]
        with self._lock:
            self._out.discard(lanes)
            self._idle.append((kind, lanes))
            del self._idle[: -max(1, len(self._out))]

    def idle(self) -> list[LaneSet]:
        """Return the sets that no request has."""
        with self._lock:
            return [lanes for _, lanes in self._idle]

    def nbytes(self) -> int:
        """Bytes of the idle sets."""
        return sum(lanes.nbytes() for lanes in self.idle())
