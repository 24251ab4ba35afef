"""A pipeline with the cache on: each call of exactly this pipeline is a request.

Python looks up `__call__` on the class, so the instance gets a subclass of its own class, of the
same name, that opens a request around the call. `disable` gives the instance its class back.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from dbcache.adapters.patching.derived_class import ClassCache, derived_class, plain_class
from dbcache.adapters.pipelines.continued import begins_later, continued
from dbcache.adapters.pipelines.events import part_of_steps, watched
from dbcache.adapters.pipelines.exchanged import Exchanged
from dbcache.adapters.requests.cached_transformer import HANDLE, CachedTransformer
from dbcache.adapters.requests.clock import Steps
from dbcache.adapters.requests.context import ACTIVE, active, outside
from dbcache.adapters.requests.record import RequestRecord
from dbcache.adapters.requests.request import Request
from dbcache.adapters.requests.setup import Setup


class CachedPipeline:
    """Opens and closes the requests of a pipeline's transformers.

    Args:
        pipe: the pipeline.
        transformers: those of its transformers that are cached, each with its setup.

    Attributes:
        exchanged: those that took their places since.
        closed: what is kept of the call that ended last, per transformer.
        seconds: what that call took, on the host.
    """

    def __init__(self, pipe: Any, transformers: Sequence[tuple[CachedTransformer, Setup]]) -> None:
        self.pipe = pipe
        self.transformers = list(transformers)
        self.closed: list[RequestRecord] = []
        self.doubts_scheduler = False
        self.seconds: float | None = None
        self._open: list[PipelineCall] = []
        self.exchanged = Exchanged(pipe, [handle.module for handle, _ in transformers])

    @property
    def is_on(self) -> bool:
        """Whether the pipeline's calls are requests."""
        return self.pipe.__dict__.get(HANDLE) is self

    def call(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the pipeline as a request."""
        new = self.exchanged.follow(self)
        if new is not self:
            return new.call(run, args, kwargs)
        kwargs = {name: outside(name, value) for name, value in kwargs.items()}
        if begins_later(plain_class(self.pipe).__call__):
            output = run(*args, **kwargs)
        else:
            with self._opened() as call, active(call.requests):
                output = run(*args, **kwargs)
        return continued(output, self._opened, self._has_room)

    def _has_room(self) -> bool:
        return all(handle.has_room() for handle, _ in self.transformers)

    @contextmanager
    def _opened(self) -> Iterator[PipelineCall]:
        with ExitStack() as stack:
            call = PipelineCall(self)
            stack.callback(call.close)
            call.open()
            has_scheduler = stack.enter_context(watched(self.pipe, call))
            call.follow(has_scheduler=has_scheduler)
            yield call

    def shown(self) -> list[RequestRecord]:
        """Return what a summary shows: the call that ended last, else one under way."""
        under_way = [] if self.closed else self._open[-1:]
        requests = [request for call in under_way for request in call.requests.copy().values()]
        return self.closed or [request.shown() for request in requests]


class PipelineCall:
    """One call of a pipeline: a request on each of its transformers.

    Attributes:
        requests: by the identity of their transformers.
    """

    def __init__(self, pipeline: CachedPipeline) -> None:
        self.pipeline = pipeline
        self.requests: dict[int, Request] = {}
        self._began = time.perf_counter()
        self._handled = sys.exc_info()[1]
        self._steps_of_scheduler: int | None = None
        self._parts: dict[str | None, int | None] = {}

    def open(self) -> None:
        """Open the requests; waits where as many are open as there may be."""
        transformers = self.pipeline.transformers
        for (handle, setup), name in zip(transformers, self.pipeline.exchanged.names, strict=False):
            request = Request(setup, follows=True)
            request.clock.planned_steps = self._planned_steps
            if len(transformers) > 1:
                request.part, request.clock.shares_steps = name or "", True
                request.clock.planned_steps = functools.partial(self._part_of_steps, name)
            self.requests[id(handle.module)] = request
        # in one order for all pipelines: else two could wait for each other
        for handle in sorted((handle for handle, _ in transformers), key=id):
            handle.open(self.requests[id(handle.module)], waits=True)
        self.pipeline._open.append(self)
        self.pipeline.exchanged.say(self.requests.values())

    def _planned_steps(self) -> Steps:
        """Return the steps of the call, where the pipeline tells them, and the scheduler's."""
        return getattr(self.pipeline.pipe, "_num_timesteps", None), self._steps_of_scheduler, None

    def _part_of_steps(self, name: str | None) -> Steps:
        """Return the scheduler's steps that fall to the transformer of that name, and them all."""
        if name not in self._parts:  # reads the scheduler's times from the device
            self._parts[name] = part_of_steps(self.pipeline.pipe, name)
        return None, self._parts[name], self._steps_of_scheduler

    def follow(self, *, has_scheduler: bool) -> None:
        """Tell the branches of guidance whether a scheduler says where steps end."""
        doubts = self.pipeline.doubts_scheduler
        for request in self.requests.values():
            request.clock.branches.is_doubted = doubts
            request.clock.branches.tells_steps = has_scheduler and not doubts

    def is_current(self) -> bool:
        """Whether the code that runs now belongs to this call."""
        now = ACTIVE.get()
        return any(now.get(key) is request for key, request in self.requests.items())

    def end_step(self) -> None:
        """The scheduler made a step."""
        for request in self.requests.values():
            request.clock.branches.end_step()

    def start_loop(self, steps: int | None) -> None:
        """A denoising loop begins; all but the first of a call begin anew."""
        self._steps_of_scheduler = steps
        self._parts.clear()
        for request in self.requests.values():
            request.start_loop()

    def change_control(self) -> None:
        """A ControlNet is called with another scale than before."""
        for request in self.requests.values():
            request.force_full("the scale of the ControlNet changed")

    def close(self) -> None:
        """Close the requests."""
        pipeline, is_cut_short = self.pipeline, sys.exc_info()[1] is not self._handled
        pairs = zip(pipeline.transformers, self.requests.values(), strict=False)
        for (handle, _), request in pairs:
            request.notices.is_over |= is_cut_short
            handle.close(request)
            pipeline.doubts_scheduler = request.clock.branches.is_doubted
            if handle.enabled.alone is None:
                handle.begin_anew(None)
        if self not in pipeline._open:
            return  # it was not opened
        pipeline._open.remove(self)
        records = [request.record for request in self.requests.values()]
        pipeline.seconds = time.perf_counter() - self._began
        pipeline.closed = [record for record in records if record is not None]


@ClassCache
def request_class(cls: Any) -> Any:
    """Return a subclass of a pipeline's class, of the same name, whose calls are requests."""

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = self.__dict__.get(HANDLE)
        run = functools.partial(cls.__call__, self)
        return run(*args, **kwargs) if handle is None else handle.call(run, args, kwargs)

    return derived_class(cls, {"__call__": __call__}, HANDLE)
