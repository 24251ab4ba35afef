"""Subclasses made at run time, of the same name, that one instance is given for some time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class _Quiet:
    """Hides the `__init_subclass__` of a base, which may want arguments, or register the class."""

    __slots__ = ()

    def __init_subclass__(cls, **_: Any) -> None:
        pass


PLAIN = "_dbcache_plain"
"""Name of the attribute of a derived class that holds the class that it was derived from."""


def derived_class(cls: Any, methods: dict[str, Any], hidden: str) -> Any:
    """Return a subclass of `cls`, of the same name and layout, with other `methods`.

    Calling the subclass makes a plain instance of `cls`, and so do copies and pickles.

    Args:
        cls: the class of the instance.
        methods: what the subclass does differently, by name.
        hidden: attribute of instances that copies of them do not have.
    """

    def __new__(_: Any, *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _blank, (cls,), without(self, hidden)

    namespace = {
        "__new__": __new__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        PLAIN: cls,
        **methods,
    }

    class Meta(type(cls)):  # type: ignore[misc]
        """Looks at `_Quiet` before the base, which alone gives the layout of instances."""

        def mro(self) -> list[type]:
            return [self, _Quiet, *cls.__mro__]

    return type.__new__(Meta, cls.__name__, (cls,), namespace)


def without(instance: Any, hidden: str) -> dict[str, Any]:
    """Return the attributes of an instance but one."""
    return {name: value for name, value in list(vars(instance).items()) if name != hidden}


def plain_class(instance: Any) -> Any:
    """Return the class of an instance without what was derived from it."""
    return vars(type(instance)).get(PLAIN, type(instance))


def _blank(cls: Any) -> Any:
    return cls.__new__(cls)


class ClassCache:
    """Derived classes by their base, each for as long as an instance has it.

    Args:
        make: returns the derived class of a base.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make
        self._made: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __call__(self, cls: Any) -> Any:
        known = self._made.get(cls)
        derived = None if known is None else known()
        if derived is None:
            derived = self._make(cls)
            self._made[cls] = weakref.ref(derived)
        return derived
