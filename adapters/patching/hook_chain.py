"""The chain of forwards that hooks of accelerate and diffusers make of a module's `forward`.

A hook replaces `forward` and keeps what it replaced: accelerate as `_old_forward` of the module,
diffusers in a reference per hook of the module's registry. A hook that goes puts back what it kept.
So whatever is to outlast the hooks must lie beneath them.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

PARALLEL = ("diffusers.hooks.context_parallel", "dbcache.parallel.sequence")
"""Modules of hooks that split inputs over ranks: beneath them is a part of the tokens alone."""

MOST = 200
"""Objects that are looked at in search of a callable within others."""


class Link(NamedTuple):
    """A place where a forward of a module is kept.

    Attributes:
        holder: a module's `__dict__`, or the object whose attribute it is.
        name: the key, or the attribute.
    """

    holder: Any
    name: str

    def get(self) -> Any:
        """Return what is kept there; None where nothing is."""
        if isinstance(self.holder, dict):
            return self.holder.get(self.name)
        return getattr(self.holder, self.name)

    def is_place(self, other: Link) -> bool:
        """Whether it is the same place as another one."""
        return self.holder is other.holder and self.name == other.name

    def set(self, value: Any) -> None:
        """Keep another forward there."""
        if isinstance(self.holder, dict):
            self.holder[self.name] = value
        else:
            setattr(self.holder, self.name, value)


def links(own: dict[str, Any], name: str) -> Iterator[Link]:
    """Yield where the hooks of a module keep its forward, the outermost one first.

    Args:
        own: the `__dict__` of the module, or a copy of it.
        name: of the method, "forward".
    """
    link: Link | None = Link(own, name)
    seen: list[Link] = []
    while link is not None and not any(link.is_place(one) for one in seen):
        yield link
        seen.append(link)
        link = _beneath(own, name, link.get())


def places(own: dict[str, Any], name: str) -> Iterator[Link]:
    """Yield the links, and where hooks of diffusers keep what is not called any more."""
    yield from links(own, name)
    registry = own.get("_diffusers_hook")
    for reference in getattr(registry, "_fn_refs", ()):
        for attribute in ("forward", "original_forward"):
            yield Link(reference, attribute)


def innermost(own: dict[str, Any], name: str) -> Link:
    """Return the link beneath all hooks but those that split inputs over ranks."""
    last = Link(own, name)
    for link in links(own, name):
        last = link
        if type(getattr(_hook(link.get()), "__self__", None)).__module__ in PARALLEL:
            break
    return last


def leads_to(value: Any, wanted: Any) -> bool:
    """Whether a callable holds another one, as wrappers do what they wrap."""
    seen: set[int] = set()
    ahead = [value]
    while ahead and len(seen) < MOST:
        one = ahead.pop()
        if one is wanted:
            return True
        if id(one) not in seen and not isinstance(one, torch.nn.Module | torch.Tensor | type):
            seen.add(id(one))
            ahead += _held(one)
    return False


def _beneath(own: dict[str, Any], name: str, value: Any) -> Link | None:
    """Return where the hook that made `value` keeps what it replaced; None if none did."""
    if not isinstance(value, functools.partial):
        return None
    if getattr(value.func, "__module__", None) == "accelerate.hooks":
        return Link(own, f"_old_{name}") if f"_old_{name}" in own else None
    reference = _reference(value)
    if reference is not None:
        return Link(reference, "forward")
    reference = getattr(getattr(value.func, "__self__", None), "fn_ref", None)
    return None if reference is None else Link(reference, "original_forward")


def _reference(value: Any) -> Any:
    """Return in what a hook of diffusers that made `value` keeps its functions; None without."""
    function = getattr(value, "func", None)
    kept = _enclosed(function) if isinstance(function, types.FunctionType) else []
    found = (one for one in kept if hasattr(one, "pre_forward") and hasattr(one, "forward"))
    return next(found, None)


def _hook(value: Any) -> Any:
    return getattr(_reference(value), "pre_forward", None)


def _held(value: Any) -> list[Any]:
    """Return the objects that a callable may call."""
    held = [getattr(value, "__wrapped__", None), *getattr(value, "__dict__", {}).values()]
    if isinstance(value, functools.partial):
        held += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        held += [value.__func__, value.__self__]
    elif isinstance(value, types.FunctionType):
        held += _enclosed(value)
    return [one for one in held if callable(one) or hasattr(one, "__dict__")]


def _enclosed(function: types.FunctionType) -> list[Any]:
    """Return what the variables hold that a function has from around it."""
    held = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            held.append(cell.cell_contents)
    return held
