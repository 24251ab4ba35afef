"""A request that the user starts: for serving engines and loops that call a transformer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from dbcache.adapters.requests.cached_transformer import CachedTransformer
from dbcache.adapters.requests.context import ACTIVE, active
from dbcache.adapters.requests.request import Request
from dbcache.adapters.requests.setup import Setup

_OUTER: ContextVar[Any] = ContextVar("dbcache_outer_requests", default=None)
"""Requests that were active before each `with request:` of this thread or task, the last first."""

CROSSED = (
    "request: what was entered last must be left first, got another order, so that calls went to "
    "the wrong request; leave `with request:` before each yield of a generator"
)


class RequestHandle:
    """One image or video, whose calls of the transformer may come from any thread, in any order.

        request = dbcache.start_request(transformer, num_inference_steps=28)
        with request:                       # as often as needed, a step at a time
            noise = transformer(...)
        with request.branch("uncond"):      # also activates the request
            noise = transformer(...)
        print(request.summary())
        request.close()

    Made by `dbcache.start_request`. A request that is dropped without `close` is freed.

    Args:
        pairs: transformers with their requests.
        show: makes the summary of a list of requests.
    """

    def __init__(
        self, pairs: Sequence[tuple[CachedTransformer, Request]], show: Callable[..., Any]
    ) -> None:
        self._pairs = list(pairs)
        self._show = show

    def requests(self) -> dict[int, Request]:
        """Return the requests by the identity of their transformers.

        Raises:
            RuntimeError: they were closed.
        """
        if self.is_closed:
            raise RuntimeError(
                "request: must be open, got one that was closed; start another one with "
                "dbcache.start_request"
            )
        return {id(handle.module): request for handle, request in self._pairs}

    def __enter__(self) -> RequestHandle:
        """Let forwards called inside belong to this request, in this thread or task."""
        requests, before = self.requests(), ACTIVE.get()
        _OUTER.set((self, before, _OUTER.get()))
        ACTIVE.set({**before, **requests})
        return self

    def __exit__(self, *_: object) -> None:
        outer = _OUTER.get()
        if outer is None:
            return
        last, before, rest = outer
        left = last
        while left is not self and rest is not None:
            left, before, rest = rest
        ACTIVE.set(before)
        _OUTER.set(rest)
        if last is not self:
            raise RuntimeError(CROSSED)

    @contextmanager
    def branch(
        self, name: str, step_index: int | None = None, num_inference_steps: int | None = None
    ) -> Iterator[RequestHandle]:
        """Activate the request and name the guidance branch of the calls inside.

        Args:
            name: of the branch, as in "cond" and "uncond".
            step_index: number of the step; a step ends when the number changes. None: when the
                time that the transformer is given changes.
            num_inference_steps: of the request, where the options did not tell.
        """
        with ExitStack() as stack:
            requests = self.requests()
            stack.enter_context(active(requests))
            for request in requests.values():
                stack.enter_context(request.clock.named(name, step_index, num_inference_steps))
            yield self

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return any(request.is_closed for _, request in self._pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of this request; 0 after `close`."""
        return sum(request.lane_set.nbytes() for _, request in self._pairs)

    def summary(self, details: bool = False) -> Any:
        """Return what the request did so far; reads it from the device.

        Args:
            details: let the text of the summary list each step.

        Returns:
            A `Summary`, as `dbcache.summary`.
        """
        return self._show([request for _, request in self._pairs], details)

    def close(self) -> None:
        """End the request; its buffers go to the next one. Closing twice does no harm."""
        for handle, request in self._pairs:
            if not request.is_closed:
                handle.close(request)


def check_options(setup: Setup, old: Setup) -> None:
    """Raise a ValueError if settings of a request need other blocks or buffers than `old` has."""
    if not setup.stacks:
        return  # not learned yet, and not made of what `old` may have learned since
    for stack, its_old in zip(setup.stacks, old.stacks, strict=True):
        if stack.geometry != its_old.geometry:
            got = f"Fn={stack.fn}, Bn={stack.bn} in place of Fn={its_old.fn}, Bn={its_old.bn}"
            raise ValueError(
                f"{stack.name}: the options of a request must leave the blocks as they are, "
                f"got {got} or another choice of blocks; set them in dbcache.enable"
            )
        own, theirs = stack.settings, its_old.settings
        if own.buffers != theirs.buffers:
            raise ValueError(
                f"{stack.name}: the options of a request must need no other buffers, got "
                f"another policy, cache_dtype, number of snapshots or way to compare; set them "
                f"in dbcache.enable"
            )
