"""Which request a forward belongs to: this follows from where the forward is called.

A context variable holds the requests that are active, by transformer. Threads start without any;
tasks and threads that copy a context take its requests along.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

ACTIVE: ContextVar[Mapping[int, Any]] = ContextVar("dbcache_requests", default={})  # noqa: B039
"""Requests by the identity of their transformer. The mapping is replaced, never changed."""


class Suspended:
    """Stands for a request while code runs that is not part of it, such as a user's callback."""

    def __init__(self, request: Any) -> None:
        self.request = request


def around(module: Any) -> Any:
    """Return the request of a transformer that the running code is part of, or is called from."""
    found = ACTIVE.get().get(id(module))
    return found.request if isinstance(found, Suspended) else found


class Place:
    """One thread, or one task of a thread: what has an implicit request of its own.

    Attributes:
        thread: the thread.
        task: the task of asyncio; None outside of one.
    """

    def __init__(self) -> None:
        self.thread = weakref.ref(threading.current_thread())
        task = _current_task()
        self.task = None if task is None else weakref.ref(task)

    def is_here(self) -> bool:
        """Whether the code that runs now runs in this thread and task."""
        task = None if self.task is None else self.task()
        is_task = _current_task() is task and (self.task is None or task is not None)
        return is_task and self.thread() is threading.current_thread()


PLACE: ContextVar[Place | None] = ContextVar("dbcache_place", default=None)
"""Where the code ran that asked last; a copied context holds that of another thread or task."""


def _current_task() -> Any:
    """Return the task of asyncio that runs now, None outside of one."""
    if "asyncio" not in sys.modules or asyncio._get_running_loop() is None:
        return None
    return asyncio.current_task()


def current_place() -> Place:
    """Return the thread or task that the code runs in; a copied context is a place of its own."""
    place = PLACE.get()
    if place is None or not place.is_here():
        place = Place()
        PLACE.set(place)
    return place


@contextmanager
def active(requests: Mapping[int, Any]) -> Iterator[None]:
    """Let forwards belong to `requests`, given by the identity of their transformers."""
    token = ACTIVE.set({**ACTIVE.get(), **requests})
    try:
        yield
    finally:
        try:  # noqa: SIM105 (three calls more on each step with a callback)
            ACTIVE.reset(token)
        except ValueError:  # of a generator or coroutine that is ended in another context
            pass


@contextmanager
def suspended() -> Iterator[None]:
    """Let forwards belong to no request that is active now."""
    with active({key: Suspended(request) for key, request in ACTIVE.get().items()}):
        yield


def outside(name: str, value: Any) -> Any:
    """Return an argument of a pipeline; a user's callback as one that runs outside of requests."""
    if "callback" not in name or not callable(value) or isinstance(value, type):
        return value
    if hasattr(type(value), "tensor_inputs") or hasattr(value, "tensor_inputs"):
        return value  # pipelines look at the class of these objects of diffusers

    @functools.wraps(value)
    def callback(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            return value(*args, **kwargs)

    return callback
