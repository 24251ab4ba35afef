"""What forwards see in place of a model's lists of blocks, each its own, while they overlap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from dbcache.adapters.blocks.block_list import WHOLE, BlockList, Entry, Place

FORWARD: ContextVar[Any] = ContextVar("dbcache_forward", default=None)
"""The forward under way in this thread or task; None where no cache is at work.

Its `rows` are what it sees: entries by the place of the list, as many as that has blocks.
"""


@contextmanager
def under_way(forward: Any) -> Iterator[None]:
    """Let what runs inside be part of a forward; of none, seeing the blocks themselves: None."""
    outer = FORWARD.get()
    FORWARD.set(forward)
    try:
        yield
    finally:
        FORWARD.set(outer)


class BlocksView(Sequence[Any]):
    """Stands where a model looks a list of blocks up while forwards with a cache are under way.

    Each thread and task sees the entries of its own forward, and one without a cache the blocks.
    """

    __slots__ = ("_blocks", "_place")

    def __init__(self, blocks: torch.nn.Module, place: Place) -> None:
        self._blocks: Any = blocks
        self._place = place

    def _now(self) -> Any:
        forward = FORWARD.get()
        row = None if forward is None else forward.rows.get(self._place)
        return self._blocks if row is None else row

    def __iter__(self) -> Iterator[Any]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def __getitem__(self, index: Any) -> Any:
        return self._now()[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blocks, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._blocks,)  # copies hold the list itself


def _itself(blocks: Any) -> Any:
    return blocks


def _plain_state(module: torch.nn.Module) -> dict[str, Any]:
    """Return what copies and pickles of a module are made of while other blocks are shown in it."""
    own = without_shown(module, module.__dict__)
    own.pop("__getstate__", None)
    return own


def without_shown(module: torch.nn.Module, own: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes `own` of a module without those that lie over its lists of blocks."""
    return {name: value for name, value in own.copy().items() if name not in module._modules}


def rows_of(lists: Sequence[BlockList], entries: Sequence[list[Entry]]) -> dict[Place, list[Entry]]:
    """Return what a forward sees, by place; of a list in parts the blocks around are themselves."""
    rows: dict[Place, list[Entry]] = {}
    for block_list, row in zip(lists, entries, strict=False):
        if block_list.part is WHOLE:
            rows[block_list.place] = row
        else:
            rows.setdefault(block_list.place, [*block_list.whole()])[block_list.part] = row
    return rows


@dataclass(frozen=True)
class Shown:
    """What lies over the lists of a model while forwards are under way.

    Attributes:
        rows: what a forward sees, by place of the list.
        entries: (attributes of a module, name, row, view). The row is shown while all forwards see
            the same ones, the view, a `BlocksView`, where they see different ones.
    """

    rows: Mapping[Place, list[Entry]]
    entries: Sequence[tuple[dict[str, Any], str, Any, Any]]


def shown(
    lists: Sequence[BlockList], entries: Sequence[list[Entry]], model: torch.nn.Module
) -> Shown:
    """Return what lies over `lists` of `model` while forwards see `entries` in their place."""
    rows = rows_of(lists, entries)
    over: dict[tuple[int, str], tuple[dict[str, Any], str, Any, Any]] = {}
    for block_list in lists:
        module, name = block_list.shown_in
        own = module.__dict__
        row = rows[block_list.place]
        holder: Any = block_list.owner._modules[block_list.name]
        view = BlocksView(holder, block_list.place)
        if module is block_list.owner:
            over[id(own), name] = own, name, row, view
        else:  # looked up by key, past any entry in __dict__: the dictionary as a whole is replaced
            modules = block_list.owner._modules
            whole = over.setdefault((id(own), name), (own, name, dict(modules), dict(modules)))
            whole[2][block_list.name], whole[3][block_list.name] = row, view
        if module is not model:
            plain = functools.partial(_plain_state, module)
            over[id(own), "__getstate__"] = own, "__getstate__", plain, plain
    return Shown(rows, list(over.values()))


def run_seeing(views: Any, forward: Any, over: Shown, call: Callable[[], Any]) -> Any:
    """Return what `call`, the forward of a model, returns while `views` show it `over`."""
    with under_way(forward):
        views.show(over)
        try:
            return call()
        finally:
            views.hide()
