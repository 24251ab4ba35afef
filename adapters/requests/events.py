"""Follows a pipeline's call from outside: where steps end, loops begin, a ControlNet's scale turns.

For the duration of a call its schedulers get a subclass of their own class, of the same name, and
its ControlNets a hook; both are taken back after it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from dbcache.adapters.blocks.block_adapter import unwrap

OBSERVERS = "_dbcache_observers"
"""Name of the attribute that holds a scheduler's observers during a call."""

SCALE = "conditioning_scale"
"""Parameter of diffusers' ControlNets: a number, or one per ControlNet."""


class Observer(Protocol):
    """What is told of a call under way."""

    def end_step(self) -> None:
        """The scheduler made a step."""

    def start_loop(self) -> None:
        """The scheduler was given timesteps: a denoising loop begins."""

    def change_control(self) -> None:
        """A ControlNet is called with another scale than before."""


class Observers(list[Observer]):
    """The observers of a scheduler, which are also those of its copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Observers:
        return self


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


def _is_scheduler(part: Any) -> bool:
    return all(callable(getattr(type(part), name, None)) for name in ("step", "set_timesteps"))


def _takes_scale(module: torch.nn.Module) -> bool:
    return SCALE in inspect.signature(type(unwrap(module)).forward).parameters


@contextmanager
def _watched_scheduler(scheduler: Any, observer: Observer) -> Iterator[None]:
    observers = vars(scheduler).get(OBSERVERS)
    if observers is None:  # not so if a call inside another shares it
        observers = vars(scheduler)[OBSERVERS] = Observers()
        cls: Any = type(scheduler)
        scheduler.__class__ = watched_class(cls)
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)
        if not observers:
            del vars(scheduler)[OBSERVERS]
            scheduler.__class__ = type(scheduler).__base__


@functools.cache
def watched_class(cls: Any) -> Any:
    """Return a subclass of `cls`, of the same name, that tells the observers of an instance."""

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.step(self, *args, **kwargs)
        for observer in vars(self)[OBSERVERS]:
            observer.end_step()
        return output

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.set_timesteps(self, *args, **kwargs)
        for observer in vars(self)[OBSERVERS]:
            observer.start_loop()
        return output

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Copy a scheduler that is still watched as it is, one that is no longer as a plain one."""
        if vars(self)[OBSERVERS]:
            return object.__reduce_ex__(self, protocol)
        return (
            _blank,
            (cls,),
            {name: value for name, value in vars(self).items() if name != OBSERVERS},
        )

    namespace = {
        "step": step,
        "set_timesteps": set_timesteps,
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), namespace)


def _blank(cls: Any) -> Any:
    return cls.__new__(cls)


@contextmanager
def _watched_control(module: torch.nn.Module, observer: Observer) -> Iterator[None]:
    last: list[float] = []

    def compare(_: Any, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get(SCALE)
        scale: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
        if not all(isinstance(value, int | float) for value in scale):
            return  # comparing tensors would wait for the device
        if last and last != scale:
            observer.change_control()
        last[:] = scale

    hook = module.register_forward_pre_hook(compare, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
