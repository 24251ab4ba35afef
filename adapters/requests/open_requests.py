"""The requests that are open on a transformer: as many as it may have at once."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from dbcache.adapters.requests.context import around
from dbcache.adapters.requests.request import Request

TOO_MANY = (
    "{who} may have {most} requests open at once, got one more; close requests that are done "
    "(request.close(), or the generator that a pipeline returned), or enable with a higher "
    "max_requests"
)


Key = TypeVar("Key")


def living(kept: weakref.WeakKeyDictionary[Key, Any]) -> list[Key]:
    """Return the keys that live; its own iterators fail where another thread adds one meanwhile."""
    return [key for reference in kept.keyrefs() if (key := reference()) is not None]


class OpenRequests:
    """Requests that are open on a transformer; those that are dropped are so no longer.

    Args:
        module: the transformer.
        on_dropped: is called, with the lock, after one of them was dropped.
    """

    def __init__(self, module: torch.nn.Module, on_dropped: Callable[[], None]) -> None:
        self.module = module
        self._on_dropped = on_dropped
        self._was_dropped = False
        self._lock = threading.RLock()
        # with the thread that opened each, and what notices that it is dropped
        self._open: weakref.WeakKeyDictionary[Request, Any] = weakref.WeakKeyDictionary()
        self._freed = threading.Condition(self._lock)

    def __iter__(self) -> Iterator[Request]:
        return iter(living(self._open))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads from changing them, and what follows from them."""
        try:
            with self._lock:
                yield
        finally:
            if self._was_dropped:
                self._drop()

    def _drop(self) -> None:
        """Note that one was dropped; called by the collector, at any line of any thread.

        Where the lock is taken, by this thread or another one, that is done when it is free.
        """
        self._was_dropped = True
        while self._was_dropped and not self._lock._is_owned():  # type: ignore[attr-defined]
            if not self._lock.acquire(blocking=False):
                return
            try:
                self._was_dropped = False
                self._on_dropped()
            finally:
                self._lock.release()

    def __len__(self) -> int:
        return len(living(self._open))

    def add(self, request: Request, most: int, *, waits: bool) -> None:
        """Count a request in.

        Args:
            request: that of a pipeline's call, or one that the user started.
            most: how many may be open.
            waits: where as many are open, wait for one to close in another thread.

        Raises:
            RuntimeError: as many are open, and `waits` is False, or all of them are of this thread,
                which would wait for ever.
        """
        here, are_all_needed = threading.current_thread(), False
        while not self.has_room(most) if waits else len(self) >= most:
            if waits and any(thread is not here for thread, _ in list(self._open.values())):
                self._freed.wait(0.1)  # requests that are dropped do not tell
            elif are_all_needed:
                raise RuntimeError(TOO_MANY.format(who=type(self.module).__name__, most=most))
            else:
                gc.collect()  # what holds one that was dropped may be a circle
                are_all_needed = True
        finalizer = weakref.finalize(request, self._drop)
        finalizer.atexit = False
        self._open[request] = here, finalizer

    def has_room(self, most: int) -> bool:
        """Whether the call of a pipeline need not wait for one to close."""
        return len(self) < most or self._holds_one()

    def remove(self, request: Request) -> None:
        """Let the next one in."""
        _, finalizer = self._open.pop(request, (None, None))
        if finalizer is not None:
            finalizer.detach()
        self._freed.notify_all()

    def _holds_one(self) -> bool:
        """Whether the code that runs now is part of one of them: to wait would be for ever."""
        own = around(self.module)
        return own is not None and own in self._open
