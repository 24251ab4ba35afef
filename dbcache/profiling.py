"""Named ranges of the cache's own work, for `torch.profiler` and NVTX, and the time of each step.

While `profile` is on, the methods that do this work are wrapped; without it they are as they are,
so that it costs nothing when it is off.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dbcache.adapters.requests.record import TIMES
from dbcache.adapters.requests.request import Request, device_of
from dbcache.adapters.stacks.prunable_blocks import SingleBlocksStep
from dbcache.adapters.stacks.pruned_stack import PrunedStep
from dbcache.adapters.stacks.row_step import RowStep
from dbcache.adapters.stacks.step import StackStep, Step
from dbcache.config.options import check_flag
from dbcache.lanes.lane import Lane

RANGES = ("step", "probe", "decide", "predict", "commit", "middle blocks")
"""Names of the ranges, each after "dbcache: "."""

_LOCK = threading.RLock()
_PROFILES: list[Profile] = []
_ORIGINALS: list[tuple[type, str, Any]] = []


class Profile:
    """What happened while `profile` was on.

    Attributes:
        nvtx: NVTX ranges were pushed.
        counts: how many ranges there were, by name.
    """

    def __init__(self, nvtx: bool) -> None:
        self.nvtx = nvtx
        self.counts: Counter[str] = Counter()


@contextmanager
def profile(nvtx: bool | None = None) -> Iterator[Profile]:
    """Give the cache's work named ranges inside, and measure what each step takes.

        with torch.profiler.profile() as profiler, dbcache.profile():
            pipe(prompt)
        dbcache.report(pipe, "run.html")          # with the measured times

    The ranges are ``dbcache: step`` (a forward of the transformer), ``probe`` (the first blocks),
    ``decide``, ``predict``, ``commit`` and ``middle blocks``. All threads have them. Steps that are
    replayed as CUDA graphs have the range of the step alone. Times are those of the device, read
    when a summary is.

    Args:
        nvtx: push NVTX ranges, too, for Nsight Systems; None: where there is a CUDA device.

    Yields:
        A `Profile`, with how many ranges of each name there were.

    Raises:
        TypeError: `nvtx` is no flag. RuntimeError: NVTX is asked for without a CUDA device.
    """
    has_cuda = torch.cuda.is_available()
    nvtx = has_cuda if nvtx is None else check_flag("profile: nvtx", nvtx)
    if nvtx and not has_cuda:
        raise RuntimeError("profile: nvtx needs a CUDA device, found none; leave it out")
    found = Profile(nvtx)
    with _LOCK:
        if not _PROFILES:
            _wrap()
        _PROFILES.append(found)
    try:
        yield found
    finally:
        with _LOCK:
            _PROFILES.remove(found)
            if not _PROFILES:
                _unwrap()


class _Range:
    """A named range in torch's profiler and, where one is wanted, in NVTX."""

    def __init__(self, name: str) -> None:
        self._record = torch.profiler.record_function(f"dbcache: {name}")
        self._pushes = False
        for one in list(_PROFILES):
            one.counts[name] += 1
            self._pushes |= one.nvtx
        if self._pushes:
            torch.cuda.nvtx.range_push(f"dbcache: {name}")
        self._record.__enter__()

    def end(self) -> None:
        self._record.__exit__(None, None, None)
        if self._pushes:
            torch.cuda.nvtx.range_pop()


def _within(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that runs within a range."""

    @functools.wraps(method)
    def within(*args: Any, **kwargs: Any) -> Any:
        opened = _Range(name)
        try:
            return method(*args, **kwargs)
        finally:
            opened.end()

    return within


def _open(step: Any, name: str) -> None:
    _end(step)
    step.__dict__["_range"] = _Range(name)


def _end(step: Any) -> None:
    opened = step.__dict__.pop("_range", None)
    if opened is not None:
        opened.end()


def _begins(name: str) -> Callable[..., Any]:
    """Return what makes a method of a step open a range, where blocks run after it."""

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def begins(self: Any, *args: Any, **kwargs: Any) -> Any:
            _end(self)
            result = method(self, *args, **kwargs)
            runs = name == "probe" or not (isinstance(self, Step) and self.cached)
            if runs and (name == "probe" or self.lane is not None):
                _open(self, name)
            return result

        return begins

    return wrap


def _ends(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def ends(self: Any, *args: Any, **kwargs: Any) -> Any:
        _end(self)
        return method(self, *args, **kwargs)

    return ends


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method that runs a step of a request, which notes what the step took."""
    method = _within("step", method)

    @functools.wraps(method)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = device_of(*args, **kwargs)
        is_cuda = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        begin = _event() if is_cuda else time.perf_counter()
        output = method(self, *args, **kwargs)
        end = _event() if is_cuda else time.perf_counter()
        if self.clock.calls == 0:
            setattr(self, TIMES, {})
        times = self.__dict__.setdefault(TIMES, {})
        times.setdefault(self.clock.branch, []).append((begin, end))
        return output

    return timed


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _wrapped(name: str) -> Callable[..., Any]:
    return functools.partial(_within, name)


_METHODS: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (Request, "_step", _timed),
    (Step, "begin", _begins("probe")),
    (Step, "_decide", _wrapped("decide")),
    (Step, "decide", _begins("middle blocks")),
    (RowStep, "_decide", _wrapped("decide")),
    (Step, "finish_full", _ends),
    (StackStep, "abort", _ends),
    (Step, "on_output", _ends),
    (Lane, "predict", _wrapped("predict")),
    (Lane, "commit", _wrapped("commit")),
    (PrunedStep, "open", lambda method: _begins("middle blocks")(_within("decide", method))),
    (PrunedStep, "close", _ends),
    (SingleBlocksStep, "replace", _wrapped("predict")),
    (SingleBlocksStep, "keep", _wrapped("commit")),
)


def _wrap() -> None:
    for cls, name, wrap in _METHODS:
        original = cls.__dict__[name]
        _ORIGINALS.append((cls, name, original))
        setattr(cls, name, wrap(original))


def _unwrap() -> None:
    while _ORIGINALS:
        cls, name, original = _ORIGINALS.pop()
        setattr(cls, name, original)
