"""A pipeline with the cache on: each call of exactly this pipeline is a request.

Python looks up `__call__` on the class, so the instance gets a subclass of its own class, of the
same name, that opens a request around the call. `remove` gives it its class back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dbcache.adapters.requests.cached_transformer import HANDLE, CachedTransformer, handle_of
from dbcache.adapters.requests.events import watched


class CachedPipeline:
    """Opens and closes the requests of a pipeline's transformers.

    Args:
        pipe: the pipeline.
        modules: those of its transformers that are cached. Their handles are looked up at each
            call, since another pipeline may share a transformer and set it anew.
    """

    def __init__(self, pipe: Any, modules: list[torch.nn.Module]) -> None:
        self.pipe = pipe
        self.modules = modules
        self._class: Any = type(pipe)
        self._depth = 0

    @property
    def transformers(self) -> list[CachedTransformer]:
        """The cached transformers of this pipeline."""
        handles = [handle_of(module) for module in self.modules]
        return [handle for handle in handles if handle is not None]

    def install(self) -> None:
        """Make the pipeline's calls requests."""
        self.pipe.__dict__[HANDLE] = self
        self.pipe.__class__ = request_class(self._class)
        for transformer in self.transformers:
            transformer.pipelines.add(self)

    def remove(self) -> None:
        """Give the pipeline its own class back."""
        self.pipe.__class__ = self._class
        self.pipe.__dict__.pop(HANDLE, None)

    def _num_steps(self) -> int | None:
        """Steps of the call under way, where the pipeline tells them."""
        return getattr(self.pipe, "_num_timesteps", None)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Run one request; one inside another makes the outer one start anew after it."""
        with watched(self.pipe, self) as has_scheduler:
            self._depth += 1
            transformers = self.transformers
            for transformer in transformers:
                transformer.planned_steps = self._num_steps if len(transformers) == 1 else None
                transformer.branches.start_call(has_scheduler=has_scheduler)
                transformer.refresh()
            try:
                yield
            finally:
                self._depth -= 1
                for transformer in self.transformers:
                    if self._depth:
                        transformer.refresh()
                    else:
                        transformer.is_open = not transformer.by_request
                        transformer.branches.is_active = False
                        transformer.planned_steps = None

    def end_step(self) -> None:
        """The scheduler made a step."""
        for transformer in self.transformers:
            transformer.branches.end_step()

    def start_loop(self) -> None:
        """A denoising loop begins; all but the first of a call are requests of their own."""
        for transformer in self.transformers:
            transformer.start_loop()

    def change_control(self) -> None:
        """A ControlNet is called with another scale than before."""
        for transformer in self.transformers:
            transformer.force_full("the scale of the ControlNet changed")


def _blank(cls: Any) -> Any:
    return cls.__new__(cls)


@functools.cache
def request_class(cls: Any) -> Any:
    """Return a subclass of `cls`, of the same name, whose calls are requests."""

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__[HANDLE].request():
            return cls.__call__(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle as a plain pipeline: a copy has its cache off."""
        state = {name: value for name, value in self.__dict__.items() if name != HANDLE}
        return _blank, (cls,), state

    namespace = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), namespace)
