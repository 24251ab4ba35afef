"""A pipeline with the cache on: each call of exactly this pipeline is a request.

Python looks up `__call__` on the class, so the instance gets a subclass of its own class, of the
same name, that opens a request around the call. `disable` gives the instance its class back.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch

from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.patching.derived_class import ClassCache, derived_class
from dbcache.adapters.requests.cached_transformer import HANDLE, CachedTransformer
from dbcache.adapters.requests.context import ACTIVE, active, suspended
from dbcache.adapters.requests.events import watched
from dbcache.adapters.requests.record import RequestRecord
from dbcache.adapters.requests.request import Request
from dbcache.adapters.requests.setup import Setup

PLAIN = "_dbcache_plain"
"""Name of the attribute of a class whose calls are requests that holds the class before."""


class CachedPipeline:
    """Opens and closes the requests of a pipeline's transformers.

    Args:
        pipe: the pipeline.
        transformers: those of its transformers that are cached, each with its setup.

    Attributes:
        names: attributes of the pipeline that hold them; None where they are not to be found.
        follow: returns the handle to go on with where transformers were exchanged since.
        followed: places of those that were, and are cached; it is said with the next call.
        refused: why others are not, by their places.
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
        names = {id(unwrap(part)): name for name, part in vars(pipe).items()}
        self.names = [names.get(id(handle.module)) for handle, _ in self.transformers]
        self.follow: Callable[[CachedPipeline], CachedPipeline] = lambda pipeline: pipeline
        self.lock = threading.Lock()
        self.followed: set[int] = set()
        self.refused: dict[int, str] = {}

    def exchanged(self) -> dict[int, Any]:
        """Return what the pipeline has in place of its transformers, by their place here.

        What wraps one, or another of them, is not in its place; nor is one that is gone.
        """
        own = [handle.module for handle, _ in self.transformers]
        parts = [None if name is None else getattr(self.pipe, name, None) for name in self.names]
        return {
            i: part
            for i, part in enumerate(parts)
            if isinstance(part, torch.nn.Module)
            and not any(module is one for module in part.modules() for one in own)
        }

    def _note_exchanged(self, requests: Iterable[Request]) -> None:
        """Say which transformers are others than those that the pipeline was enabled with."""
        others = self.exchanged()
        for i, request in enumerate(requests):
            if i in self.followed:
                request.notices.add(request, "followed")
            elif i in others and i in self.refused:
                request.notices.add(request, "exchanged", why=self.refused[i])
        self.followed = set()

    @property
    def is_on(self) -> bool:
        """Whether the pipeline's calls are requests."""
        return self.pipe.__dict__.get(HANDLE) is self

    def call(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the pipeline as a request."""
        new = self.follow(self)
        if new is not self:
            return new.call(run, args, kwargs)
        kwargs = {name: _outside(name, value) for name, value in kwargs.items()}
        with self._opened() as call, active(call.requests):
            output = run(*args, **kwargs)
        if isinstance(output, Generator):
            return self._streamed(output)
        return self._awaited(output) if isinstance(output, Coroutine) else output

    @contextmanager
    def _opened(self) -> Iterator[PipelineCall]:
        with ExitStack() as stack:
            call = PipelineCall(self)
            stack.callback(call.close)
            call.open()
            has_scheduler = stack.enter_context(watched(self.pipe, call))
            call.follow(has_scheduler=has_scheduler)
            yield call

    def _streamed(self, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Run a pipeline that yields what it has so far: the request is active while it works."""
        sent = None
        with closing(steps), self._opened() as call:
            while True:
                with active(call.requests):
                    try:
                        output = steps.send(sent)
                    except StopIteration as end:
                        return end.value
                sent = yield output

    async def _awaited(self, output: Coroutine[Any, Any, Any]) -> Any:
        """Run a pipeline that is awaited: its request is active in that task."""
        with self._opened() as call, active(call.requests):
            return await output

    def shown(self) -> list[RequestRecord]:
        """Return what a summary shows: the call that ended last, else one under way."""
        if self.closed or not self._open:
            return self.closed
        return [RequestRecord.of(request) for request in self._open[-1].requests.values()]


class PipelineCall:
    """One call of a pipeline: a request on each of its transformers.

    Attributes:
        requests: by the identity of their transformers.
    """

    def __init__(self, pipeline: CachedPipeline) -> None:
        self.pipeline = pipeline
        self.requests: dict[int, Request] = {}
        self._handles: list[CachedTransformer] = []
        self._began = time.perf_counter()
        self._handled = sys.exc_info()[1]
        self._steps_of_scheduler: int | None = None

    def open(self) -> None:
        """Open the requests; waits where as many are open as there may be."""
        transformers = self.pipeline.transformers
        for (handle, setup), name in zip(transformers, self.pipeline.names, strict=False):
            request = Request(setup, follows=True)
            request.clock.shares_steps = len(transformers) > 1
            request.part = name or "" if len(transformers) > 1 else ""
            if not request.clock.shares_steps:
                request.clock.planned_steps = self._planned_steps
            self._handles.append(handle)
            self.requests[id(handle.module)] = request
        # in one order for all pipelines: else two could wait for each other
        for handle in sorted(self._handles, key=id):
            handle.open(self.requests[id(handle.module)], waits=True)
        self.pipeline._open.append(self)
        self.pipeline._note_exchanged(self.requests.values())

    def _planned_steps(self) -> tuple[int | None, int | None]:
        """Return the steps of the call, where the pipeline tells them, and the scheduler's."""
        return getattr(self.pipeline.pipe, "_num_timesteps", None), self._steps_of_scheduler

    def follow(self, *, has_scheduler: bool) -> None:
        """Find the guidance branches from the calls."""
        doubts = self.pipeline.doubts_scheduler
        for request in self.requests.values():
            request.clock.branches.is_doubted = doubts
            request.clock.follow(tells_steps=has_scheduler and not doubts)

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
        for request in self.requests.values():
            request.start_loop()

    def change_control(self) -> None:
        """A ControlNet is called with another scale than before."""
        for request in self.requests.values():
            request.force_full("the scale of the ControlNet changed")

    def close(self) -> None:
        """Close the requests."""
        pipeline, is_cut_short = self.pipeline, sys.exc_info()[1] is not self._handled
        for handle, request in zip(self._handles, self.requests.values(), strict=False):
            request.notices.is_over |= is_cut_short
            handle.close(request)
            pipeline.doubts_scheduler = request.clock.branches.is_doubted
            if handle.enabled.alone is None:
                handle.begin_anew(None)
        if self in pipeline._open:
            pipeline._open.remove(self)
        records = [request.record for request in self.requests.values()]
        pipeline.seconds = time.perf_counter() - self._began
        pipeline.closed = [record for record in records if record is not None]


def _outside(name: str, value: Any) -> Any:
    """Return a user's callback that runs outside of the request; other arguments as they are."""
    if "callback" not in name or not callable(value) or isinstance(value, type):
        return value
    if hasattr(type(value), "tensor_inputs") or hasattr(value, "tensor_inputs"):
        return value  # pipelines look at the class of these objects of diffusers
    return _suspended(value)


def _suspended(callback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(callback)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            return callback(*args, **kwargs)

    return outside


def _request_class(cls: Any) -> Any:
    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = self.__dict__.get(HANDLE)
        run = functools.partial(cls.__call__, self)
        return run(*args, **kwargs) if handle is None else handle.call(run, args, kwargs)

    return derived_class(cls, {"__call__": __call__, PLAIN: cls}, _state)


def _state(pipe: Any) -> dict[str, Any]:
    """Return what copies and pickles of a pipeline are made of: a copy has its cache off."""
    return {name: value for name, value in pipe.__dict__.items() if name != HANDLE}


request_class = ClassCache(_request_class)
"""Returns a subclass of a pipeline's class, of the same name, whose calls are requests."""


def plain_class(pipe: Any) -> Any:
    """Return the class of a pipeline without what `enable` derived from it."""
    return vars(type(pipe)).get(PLAIN, type(pipe))
