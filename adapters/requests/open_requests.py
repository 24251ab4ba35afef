"""The requests that are open on a transformer: as many as it may have at once."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from dbcache.adapters.requests.context import ACTIVE, Suspended
from dbcache.adapters.requests.request import Request

TOO_MANY = (
    "start_request: {who} may have {most} requests open at once, got one more; close requests that "
    "are done (request.close()), or enable with a higher max_requests"
)


Key = TypeVar("Key")


def living(kept: weakref.WeakKeyDictionary[Key, Any]) -> list[Key]:
    """Return the keys that live; its own iterators fail where another thread adds one meanwhile."""
    return [key for reference in kept.keyrefs() if (key := reference()) is not None]


class OpenRequests:
    """Requests that are open on a transformer; those that are dropped are so no longer.

    Args:
        module: the transformer.
        lock: held by whoever changes them.
    """

    def __init__(self, module: torch.nn.Module, lock: threading.RLock) -> None:
        self.module = module
        self._open: weakref.WeakKeyDictionary[Request, None] = weakref.WeakKeyDictionary()
        self._freed = threading.Condition(lock)

    def __iter__(self) -> Iterator[Request]:
        return iter(living(self._open))

    def __len__(self) -> int:
        return len(living(self._open))

    def add(self, request: Request, most: int, *, waits: bool) -> None:
        """Count a request in.

        Args:
            request: that of a pipeline's call, or one that the user started.
            most: how many may be open.
            waits: where as many are open, wait for one to close.

        Raises:
            RuntimeError: as many are open, and `waits` is False.
        """
        while waits and len(self) >= most and not self._holds_one():
            self._freed.wait(0.1)  # requests that are dropped do not tell
        if len(self) >= most:
            gc.collect()  # what holds one that was dropped may be a circle
        if not waits and len(self) >= most:
            raise RuntimeError(TOO_MANY.format(who=type(self.module).__name__, most=most))
        self._open[request] = None

    def remove(self, request: Request) -> None:
        """Let the next one in."""
        self._open.pop(request, None)
        self._freed.notify_all()

    def _holds_one(self) -> bool:
        """Whether the code that runs now is part of one of them: to wait would be for ever."""
        own = ACTIVE.get().get(id(self.module))
        own = own.request if isinstance(own, Suspended) else own
        return own is not None and own in self._open
