"""Follows a pipeline's call from outside: where steps end, loops begin, a ControlNet's scale turns.

For the duration of a call its schedulers get a subclass of their own class, of the same name, and
its ControlNets a hook; both are taken back after the call.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from dbcache.adapters.blocks.signature import ArgumentFinder, unwrap
from dbcache.adapters.patching.derived_class import (
    ClassCache,
    derived_class,
    plain_class,
    without,
)

OBSERVERS = "_dbcache_observers"
"""Name of the attribute that holds a scheduler's observers during a call."""

SCALE = "conditioning_scale"
"""Parameter of diffusers' ControlNets: a number, or one per ControlNet."""

_LOCK = threading.RLock()
"""Held while a scheduler's class is exchanged: calls in other threads may share the scheduler."""


class Observers(list[Any]):
    """The calls that observe a scheduler, which are also those of its copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Observers:
        return self


def _observers(scheduler: Any) -> list[Any]:
    """Return the calls that observe a scheduler, and that the code that runs now belongs to."""
    known = vars(scheduler).get(OBSERVERS, ())  # none: the call of another thread has just ended
    return [call for call in [*known] if call.is_current()]


@contextmanager
def watched(pipe: Any, call: Any) -> Iterator[bool]:
    """Tell a `PipelineCall` of what happens during it; yield whether the pipeline has a scheduler.

    It is told of the end of a step (`end_step`), of the beginning of a loop of so many steps
    (`start_loop`), and of another scale of a ControlNet (`change_control`).
    """
    parts = list(vars(pipe).values())
    schedulers = [part for part in parts if _is_scheduler(part)]
    with ExitStack() as stack:
        for scheduler in schedulers:
            stack.enter_context(_watched_scheduler(scheduler, call))
        for part in parts:
            if isinstance(part, torch.nn.Module) and ArgumentFinder(unwrap(part), (SCALE,)).name:
                stack.enter_context(_watched_control(part, call))
        yield bool(schedulers)


def part_of_steps(pipe: Any, name: str | None) -> int | None:
    """Return how many of the scheduler's steps a transformer runs; None where nothing tells.

    Where the pipeline's config has a `boundary_ratio` (Wan 2.2), `transformer` runs the steps from
    that part of the training time up, and `transformer_2` the others; without one, none.
    """
    config: Any = getattr(pipe, "config", None)
    scheduler: Any = getattr(pipe, "scheduler", None)
    times = getattr(scheduler, "timesteps", None)
    is_told = isinstance(config, Mapping) and "boundary_ratio" in config
    if not is_told or times is None or name not in ("transformer", "transformer_2"):
        return None
    boundary = (config["boundary_ratio"] or 0) * scheduler.config.num_train_timesteps
    early = int((torch.as_tensor(times) >= boundary).sum())
    return early if name == "transformer" else len(times) - early


def _is_scheduler(part: Any) -> bool:
    return all(callable(getattr(type(part), name, None)) for name in ("step", "set_timesteps"))


@contextmanager
def _watched_scheduler(scheduler: Any, call: Any) -> Iterator[None]:
    try:
        with _LOCK:
            vars(scheduler).setdefault(OBSERVERS, Observers()).append(call)
            scheduler.__class__ = watched_class(plain_class(scheduler))
        yield
    finally:
        with _LOCK:
            observers = vars(scheduler).get(OBSERVERS, Observers())
            if call in observers:
                observers.remove(call)
            if not observers:
                vars(scheduler).pop(OBSERVERS, None)
                scheduler.__class__ = plain_class(scheduler)


@ClassCache
def watched_class(cls: Any) -> Any:
    """Return a subclass of a class of schedulers that tells the observers of an instance."""

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.step(self, *args, **kwargs)
        for call in _observers(self):
            call.end_step()
        return output

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.set_timesteps(self, *args, **kwargs)
        timesteps = getattr(self, "timesteps", None)
        steps = len(timesteps) if isinstance(timesteps, torch.Tensor) else None
        for call in _observers(self):
            call.start_loop(steps)
        return output

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        """Return a copy that is watched, too, where a pipeline copies just its scheduler."""
        is_watched = vars(self).get(OBSERVERS) and not memo
        twin = object.__new__(type(self) if is_watched else cls)
        memo[id(self)] = twin
        vars(twin).update(
            copy.deepcopy(vars(self) if is_watched else without(self, OBSERVERS), memo)
        )
        return twin

    methods = {"step": step, "set_timesteps": set_timesteps, "__deepcopy__": __deepcopy__}
    return derived_class(cls, methods, OBSERVERS)


def _watched_control(module: torch.nn.Module, call: Any) -> RemovableHandle:
    last: list[float] = []

    # without `kwargs`: a call in another thread, that found the hook just before it was removed
    def compare(_: Any, __: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        given = (kwargs or {}).get(SCALE)
        scale: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
        # to compare tensors would wait for the device; another thread's call may share the module
        if all(isinstance(value, int | float) for value in scale) and call.is_current():
            if last and last != scale:
                call.change_control()
            last[:] = scale

    return module.register_forward_pre_hook(compare, with_kwargs=True)
