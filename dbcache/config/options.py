"""What all configs have in common: checked names and values, and which fields were given.

A config that knows which of its fields were given can be partial: where it modifies another one,
only those count (see `ParamsModifier`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any


def reject_unknown(who: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError that names the nearest known option, if one of `names` is not `known`."""
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"{who}: unknown option {name!r}; {hint}known: {', '.join(known)}")


def check_int(who: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{who} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{who} must be an integer {allowed}, got {value!r}")


def check_ids(who: str, value: Any, count: int | None = None) -> list[int]:
    """Return a sorted list of the block numbers in `value`, each once.

    Raises:
        TypeError: it is not a sequence of integers. ValueError: one is negative, or not below
            `count`.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{who} must be a list of block numbers, got {value!r}")
    ids = list(value)
    for entry in ids:
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise TypeError(f"{who} must be a list of block numbers, got {ids!r}")
        if entry < 0 or (count is not None and entry >= count):
            allowed = "at least 0" if count is None else f"from 0 to {count - 1}"
            raise ValueError(f"{who}: each number must be {allowed}, got {entry} in {ids!r}")
    return sorted(set(ids))


def check_number(who: str, value: Any, *, positive: bool = False) -> None:
    """Raise unless `value` is a finite number, at least 0 or (`positive`) above it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{who} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{who} must be a number {'>' if positive else '>='} 0, got {value!r}")


def check_flag(who: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{who} must be True or False, got {value!r}")


def check_choice(who: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{who} must be one of {allowed}, got {value!r}")


def check_type(who: str, value: Any, kind: type) -> None:
    """Raise a TypeError unless `value` is None or a `kind`."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{who} must be a {kind.__name__} or None, got {value!r}")


class Options:
    """Base of the configs: remembers which fields were given, checks names and values."""

    _given: frozenset[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError(f"{cls.__name__}: options are given by name, got {args!r}")
        reject_unknown(cls.__name__, kwargs, [f.name for f in dataclasses.fields(cls)])  # type: ignore[arg-type]
        self = super().__new__(cls)
        self._given = frozenset(kwargs)
        return self

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise if a field has a value that is not allowed."""

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were set, by name or by `update`, with their values."""
        return {name: getattr(self, name) for name in sorted(self._given)}

    def update(self, **options: Any) -> Any:
        """Set `options` in place and return self; None leaves a field as it is.

        Raises:
            TypeError: an option that does not exist.
            ValueError: a value that is not allowed; nothing is changed then.
        """
        names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        reject_unknown(type(self).__name__, options, names)
        options = {name: value for name, value in options.items() if value is not None}
        merged = type(self)(**{**self.as_dict(), **options})
        for name in names:
            setattr(self, name, getattr(merged, name))
        self._given = self._given | frozenset(options)
        return self

    def reset(self, **options: Any) -> Any:
        """Forget everything that was set, then set `options`; return self.

        The result is partial: where it modifies another config, only `options` count.
        """
        fresh = type(self)(**options)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            setattr(self, field.name, getattr(fresh, field.name))
        self._given = fresh._given
        return self

    empty = reset

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
