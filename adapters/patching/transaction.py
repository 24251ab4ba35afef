"""Several changes to instances of which all are made, or none."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

ABSENT = object()
"""Stands for an entry that is not there."""


class Transaction:
    """Takes all changes back if an exception, of whatever kind, ends the `with` block.

    The way back is noted before each change, and going back twice is the same as once: so it does
    not matter at which line the exception comes.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is not None:
            self.undo()

    def undo(self) -> None:
        """Take all changes back, the last one first; an error of one does not stop the others."""
        errors: list[BaseException] = []
        for step in reversed(self._undo):
            try:
                step()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def do(self, change: Callable[[], object], undo: Callable[[], object]) -> None:
        """Make a change; `undo` must do no harm where the change was not made, or in part."""
        self._undo.append(lambda: void(undo()))
        change()

    def set(self, holder: dict[str, Any], name: str, value: Any) -> None:
        """Set an entry of an instance's `__dict__`, or take it out where `value` is ABSENT."""
        before = holder.get(name, ABSENT)
        self.do(lambda: put(holder, name, value), lambda: put(holder, name, before))

    def set_class(self, instance: Any, cls: type) -> None:
        """Give an instance another class."""
        before = instance.__class__
        self.do(
            lambda: setattr(instance, "__class__", cls),
            lambda: setattr(instance, "__class__", before),
        )


def put(holder: dict[str, Any], name: str, value: Any) -> None:
    """Set an entry, or take it out where `value` is ABSENT."""
    if value is ABSENT:
        holder.pop(name, None)
    else:
        holder[name] = value


def void(_: object) -> None:
    """Drop a value."""
