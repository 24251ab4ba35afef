"""Where a model's forward looks its blocks up, and how a forward sees something else there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Entry = Callable[..., Any]
"""What a model's loop calls in place of a block, or the block itself."""

Place = tuple[int, str]
"""Identity of a module and the name under which it holds a list of blocks."""

WHOLE = slice(None)


class Seen(Protocol):
    """What a forward under way sees in place of its lists of blocks."""

    @property
    def rows(self) -> Mapping[Place, list[Entry]]:
        """Entries by the place of the list, as many as it has blocks."""


FORWARD: ContextVar[Any] = ContextVar("dbcache_forward", default=None)
"""The forward under way in this thread or task, a `Seen`; None where no cache is at work."""


@contextmanager
def outside_forwards() -> Iterator[None]:
    """Let what runs inside see the blocks themselves: it is no part of a forward under way."""
    outer = FORWARD.get()
    FORWARD.set(None)
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


class BlockList:
    """One list of blocks, or a part of one, and where the model's forward looks it up.

    Args:
        transformer: the model.
        path: name of the list seen from the transformer, as in ``"transformer_blocks"``. It may end
            in ``[:-n]`` or ``[-n:]``: all but the last n blocks, or these, n being an attribute of
            the transformer.

    Attributes:
        blocks: as last read.
        seen: all that the whole list held then.

    Raises:
        AttributeError: there is no such list.
    """

    def __init__(self, transformer: torch.nn.Module, path: str) -> None:
        self.path = path
        whole, _, part = path.partition("[")
        owner, _, self.name = whole.rpartition(".")
        self.owner = _submodule(transformer, owner)
        _submodule(transformer, whole)
        self.place: Place = id(self.owner), self.name
        self.part = WHOLE
        if part:
            split = len(self.whole()) - getattr(transformer, part.strip(":-]"))
            self.part = slice(split) if part.startswith(":") else slice(split, None)
        self.dict_owner: torch.nn.Module | None = None
        if isinstance(self.owner, torch.nn.ModuleDict):
            outer, _, self.dict_name = owner.rpartition(".")
            self.dict_owner = _submodule(transformer, outer)
        self.read()

    def read(self) -> None:
        """Read which blocks the model has now."""
        self.seen = [*self.owner._modules[self.name]._modules.values()]  # type: ignore[union-attr]
        self.blocks = self.current()

    def whole(self) -> list[torch.nn.Module]:
        """Return what the whole list holds, past a view of it."""
        blocks = self.owner._modules[self.name]
        assert blocks is not None
        return [block for block in blocks._modules.values() if block is not None]

    def current(self) -> list[torch.nn.Module]:
        """Return the blocks that the model has now."""
        return self.whole()[self.part]

    def shown_in(self) -> tuple[dict[str, Any], str]:
        """Return the attributes in which the model looks the list up, and the name there."""
        if self.dict_owner is None:
            return self.owner.__dict__, self.name
        return self.dict_owner.__dict__, self.dict_name


class _PlainState:
    """What copies and pickles of a module are made of while other blocks are shown in it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(self) -> dict[str, Any]:
        own = without_shown(self._module, self._module.__dict__)
        own.pop("__getstate__", None)
        return own


def without_shown(module: torch.nn.Module, own: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes `own` of a module without those that lie over its lists of blocks."""
    return {name: value for name, value in own.copy().items() if name not in module._modules}


def _submodule(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """Return a module within another, past the views that forwards in other threads are shown."""
    for name in filter(None, path.split(".")):
        module = module._modules.get(name) or module.get_submodule(name)
    return module


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
        own, name = block_list.shown_in()
        row = rows[block_list.place]
        holder: Any = block_list.owner._modules[block_list.name]
        view = BlocksView(holder, block_list.place)
        if block_list.dict_owner is None:
            over[id(own), name] = own, name, row, view
        else:  # looked up by key, past any entry in __dict__: the dictionary as a whole is replaced
            modules = block_list.owner._modules
            whole = over.setdefault((id(own), name), (own, name, dict(modules), dict(modules)))
            whole[2][block_list.name], whole[3][block_list.name] = row, view
        module = block_list.dict_owner or block_list.owner
        if module is not model:
            plain = _PlainState(module)
            over[id(own), "__getstate__"] = own, "__getstate__", plain, plain
    return Shown(rows, list(over.values()))
