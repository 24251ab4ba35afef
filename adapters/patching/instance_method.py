"""Methods that are replaced on one instance, as a handle that puts back what was there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class InstanceMethod:
    """Replaces a method of one module; copies and pickles as the method that it replaces.

    Args:
        module: the instance.
        name: of the method.
        call: runs in its place.
    """

    def __init__(self, module: torch.nn.Module, name: str, call: Callable[..., Any]) -> None:
        self.module = module
        self.name = name
        self.had_own = name in module.__dict__
        self.original: Callable[..., Any] = getattr(module, name)
        self.call: Callable[..., Any] | None = call
        self.is_installed = False
        functools.update_wrapper(self, self.original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.call is None:
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return _uncompiled(self.run_uncompiled, args, kwargs)
        return self.call(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> InstanceMethod:
        """Return itself, which is bound: others bind the forward that they found once more."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.had_own:
            return _identity, (self.original,)
        return _own_method, (self.module, self.name)

    def run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """Run what runs in its place, where a compiled function calls it."""
        return (self.call or self.original)(*args, **kwargs)

    @property
    def is_removed(self) -> bool:
        """Whether `remove` was called, if only in part."""
        return self.call is None

    def install(self) -> None:
        """Put it in the place of the method, once: others may wrap it later."""
        if not self.is_installed:
            self.module.__dict__[self.name] = self
            self.is_installed = True

    def remove(self) -> None:
        """Put back what was there. Where others wrapped this since, it passes through from now."""
        self.call = None
        self.clean(self.module.__dict__)

    def clean(self, own: dict[str, Any]) -> None:
        """Put back in `own`, the attributes of the module or a copy of them, what was there."""
        if own.get(self.name) is self:
            if self.had_own:
                own[self.name] = self.original
            else:
                own.pop(self.name, None)
        elif own.get(f"_old_{self.name}") is self:  # accelerate's hooks keep it there
            own[f"_old_{self.name}"] = self.original


@torch.compiler.disable(
    reason="dbcache decides on each step which blocks run, so that the model as a whole is no "
    "single graph; instead of fullgraph=True for all of it, compile its blocks, as in "
    "dbcache.compile(pipe) or transformer.compile_repeated_blocks(fullgraph=True), or call "
    "dbcache.disable first"
)
def _uncompiled(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keep Dynamo out: traced as a whole, the forward would run past the proxies."""
    return call(*args, **kwargs)


def _own_method(module: torch.nn.Module, name: str) -> Any:
    return getattr(type(module), name).__get__(module)


def _identity(value: Any) -> Any:
    return value
