"""The requests that are open on a transformer: as many as it may have at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import torch

from dbcache.adapters.requests.context import ACTIVE, Suspended
from dbcache.adapters.requests.request import Request

TOO_MANY = (
    "start_request: {who} may have {most} requests open at once, got one more; close requests that "
    "are done (request.close()), or enable with a higher max_requests"
)


class OpenRequests:
    """Requests that are open on a transformer; those that are dropped are so no longer.

    Args:
        module: the transformer.
        lock: held by whoever changes them.
    """

    def __init__(self, module: torch.nn.Module, lock: threading.RLock) -> None:
        self.module = module
        self._open: weakref.WeakSet[Request] = weakref.WeakSet()
        self._freed = threading.Condition(lock)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._open))

    def __len__(self) -> int:
        return len(list(self._open))

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
        if not waits and len(self) >= most:
            raise RuntimeError(TOO_MANY.format(who=type(self.module).__name__, most=most))
        self._open.add(request)

    def remove(self, request: Request) -> None:
        """Let the next one in."""
        self._open.discard(request)
        self._freed.notify_all()

    def _holds_one(self) -> bool:
        """Whether the code that runs now is part of one of them: to wait would be for ever."""
        own = ACTIVE.get().get(id(self.module))
        own = own.request if isinstance(own, Suspended) else own
        return own is not None and own in self._open
