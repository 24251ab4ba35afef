"""Follows a pipeline's call from outside: where steps end, loops begin, a ControlNet's scale turns.

For the duration of a call its schedulers get a subclass of their own class, of the same name, and
its ControlNets a hook; both are taken back after the call.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from dbcache.adapters.blocks.signature import unwrap
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

NOTHING: Mapping[str, Any] = {}

_LOCK = threading.RLock()
"""Held while a scheduler's class is exchanged: calls in other threads may share the scheduler."""


class Observer(Protocol):
    """What is told of a call under way."""

    def is_current(self) -> bool:
        """Whether the code that runs now belongs to the call."""

    def end_step(self) -> None:
        """The scheduler made a step."""

    def start_loop(self, steps: int | None) -> None:
        """The scheduler was given its timesteps, so many: a denoising loop begins."""

    def change_control(self) -> None:
        """A ControlNet is called with another scale than before."""


class Observers(list[Observer]):
    """The observers of a scheduler, which are also those of its copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Observers:
        return self

    def of_this_call(self) -> list[Observer]:
        """Return the observers whose call the code that runs now belongs to."""
        return [observer for observer in self.copy() if observer.is_current()]


NOBODY = Observers()
"""Those of a scheduler that another thread's call has just stopped to watch."""


@contextmanager
def watched(pipe: Any, observer: Observer) -> Iterator[bool]:
    """Tell `observer` of what happens during a call of `pipe`; yield whether it has a scheduler."""
    parts = list(vars(pipe).values())
    schedulers = [part for part in parts if _is_scheduler(part)]
    with ExitStack() as stack:
        for scheduler in schedulers:
            stack.enter_context(_watched_scheduler(scheduler, observer))
        for part in parts:
            if isinstance(part, torch.nn.Module) and _takes_scale(part):
                stack.enter_context(_watched_control(part, observer))
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


def _takes_scale(module: torch.nn.Module) -> bool:
    return SCALE in inspect.signature(type(unwrap(module)).forward).parameters


@contextmanager
def _watched_scheduler(scheduler: Any, observer: Observer) -> Iterator[None]:
    try:
        with _LOCK:
            observers = vars(scheduler).setdefault(OBSERVERS, Observers())
            observers.append(observer)
            scheduler.__class__ = watched_class(plain_class(scheduler))
        yield
    finally:
        with _LOCK:
            observers = vars(scheduler).get(OBSERVERS, Observers())
            if observer in observers:
                observers.remove(observer)
            if not observers:
                vars(scheduler).pop(OBSERVERS, None)
                scheduler.__class__ = plain_class(scheduler)


@ClassCache
def watched_class(cls: Any) -> Any:
    """Return a subclass of a class of schedulers that tells the observers of an instance."""

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.step(self, *args, **kwargs)
        for observer in vars(self).get(OBSERVERS, NOBODY).of_this_call():
            observer.end_step()
        return output

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.set_timesteps(self, *args, **kwargs)
        timesteps = getattr(self, "timesteps", None)
        steps = len(timesteps) if isinstance(timesteps, torch.Tensor) else None
        for observer in vars(self).get(OBSERVERS, NOBODY).of_this_call():
            observer.start_loop(steps)
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


@contextmanager
def _watched_control(module: torch.nn.Module, observer: Observer) -> Iterator[None]:
    last: list[float] = []

    # without `kwargs`: a call in another thread, that found the hook just before it was removed
    def compare(_: Any, __: tuple[Any, ...], kwargs: Mapping[str, Any] = NOTHING) -> None:
        given = kwargs.get(SCALE)
        scale: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
        if not all(isinstance(value, int | float) for value in scale):
            return  # comparing tensors would wait for the device
        if not observer.is_current():
            return  # a call in another thread shares the ControlNet
        if last and last != scale:
            observer.change_control()
        last[:] = scale

    hook = module.register_forward_pre_hook(compare, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
