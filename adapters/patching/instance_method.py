"""Methods that are replaced on one instance, as a handle that puts back what was there."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from dbcache.adapters.patching.hook_chain import innermost, leads_to, links, places

EXPORTED = (
    "torch.export: {who} must be exported without its cache, which decides on each step which "
    "blocks run; call dbcache.disable on it first, and dbcache.enable afterwards"
)


class InstanceMethod:
    """Replaces a method of one module; copies and pickles as the method that it replaces.

    It lies beneath the hooks of accelerate and diffusers, which come and go.

    Args:
        module: the instance.
        name: of the method.
        call: runs in its place.
    """

    def __init__(self, module: torch.nn.Module, name: str, call: Callable[..., Any]) -> None:
        self.module = module
        self.name = name
        self._link = innermost(module.__dict__, name)
        kept = self._link.get()
        self.had_own = kept is not None
        self.original: Callable[..., Any] = getattr(module, name) if kept is None else kept
        self.call: Callable[..., Any] | None = call
        self._uncompiled = _uncompiled()
        self.is_installed = False
        functools.update_wrapper(self, self.original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.call  # another thread may call `remove` meanwhile
        if call is None:
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
                raise RuntimeError(EXPORTED.format(who=type(self.module).__name__))
            return self._uncompiled(self.run_uncompiled, args, kwargs)
        return call(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> InstanceMethod:
        """Return itself, which is bound: others bind the forward that they found once more."""
        return self

    @property
    def __code__(self) -> Any:
        """Code of the method that it replaces: torch.export looks at it before a call."""
        return self.original.__code__

    def __reduce__(self) -> tuple[Any, ...]:
        if self.had_own:
            return _identity, (self.original,)
        return _own_method, (self.module, self.name)

    def run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """Run what runs in its place, where a compiled function calls it."""
        return (self.call or self.original)(*args, **kwargs)

    @property
    def is_lost(self) -> bool:
        """Whether calls do not come here: `remove` was called, or others took the place."""
        own = self.module.__dict__
        if self.call is None or not self.is_installed or own.get(self.name) is self:
            return self.call is None
        return not any(leads_to(link.get(), self) for link in links(own, self.name))

    def install(self) -> None:
        """Put it in the place of the method, once: others may wrap it later."""
        if not self.is_installed:
            self._link.set(self)
            self.is_installed = True

    def remove(self) -> None:
        """Put back what was there. Where others wrapped this since, it passes through from now."""
        self.call = None
        own = self.module.__dict__
        self.clean(own)
        for link in places(own, self.name):
            if link.get() is self:
                link.set(self.original)
            elif getattr(link.get(), "__wrapped__", None) is self:
                link.get().__wrapped__ = self.original

    def clean(self, own: dict[str, Any]) -> None:
        """Put back in `own`, the attributes of the module or a copy of them, what was there."""
        for link in links(own, self.name):
            if link.holder is own and link.get() is self:
                if link.name == self.name and (not self.had_own or self._is_left_over()):
                    own.pop(self.name, None)
                else:
                    link.set(self.original)

    def _is_left_over(self) -> bool:
        """Whether a hook that is gone made an entry of the instance of the method of its class."""
        is_own = self._link.holder is self.module.__dict__ and self._link.name == self.name
        original = self.original
        is_method = isinstance(original, types.MethodType) and original.__self__ is self.module
        return is_method and not is_own


@functools.cache
def _uncompiled() -> Callable[..., Any]:
    """Return what runs a call with Dynamo kept out: traced as a whole, it would miss the proxies.

    Made when it is first needed, since it imports Dynamo, which takes longer than all of dbcache.
    """

    def uncompiled(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(*args, **kwargs)

    return torch.compiler.disable(
        uncompiled,
        reason="dbcache decides on each step which blocks run, so that the model as a whole is no "
        "single graph; instead of fullgraph=True for all of it, compile its blocks, as in "
        "dbcache.compile(pipe) or transformer.compile_repeated_blocks(fullgraph=True), or call "
        "dbcache.disable first",
    )


def _own_method(module: torch.nn.Module, name: str) -> Any:
    return getattr(type(module), name).__get__(module)


def _identity(value: Any) -> Any:
    return value
