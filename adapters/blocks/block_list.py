"""Where a model's forward looks its blocks up, and how a forward sees something else there."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
        self.blocks = self.current()

    def whole(self) -> list[torch.nn.Module]:
        """Return what the whole list holds, past a view of it."""
        blocks = self.owner._modules[self.name]
        assert blocks is not None
        return [block for block in blocks._modules.values() if block is not None]

    def current(self) -> list[torch.nn.Module]:
        """Return the blocks that the model has now."""
        return self.whole()[self.part]

    def has_changed(self) -> bool:
        """Whether blocks were exchanged since `blocks` was read."""
        return self.current() != self.blocks

    def show(self) -> None:
        """Put a view in place of the list."""
        holder: Any = self.owner._modules[self.name]
        view = BlocksView(holder, self.place)
        own = self._shown_in.__dict__
        own.setdefault("__getstate__", _PlainState(self._shown_in))
        if self.dict_owner is None:
            own[self.name] = view
        else:  # looked up by key, past any entry in __dict__: the dictionary as a whole is replaced
            own.setdefault(self.dict_name, dict(self.owner._modules))[self.name] = view

    def hide(self) -> None:
        """Let the model look at its own list again."""
        own = self._shown_in.__dict__
        if self.dict_owner is None:
            own.pop(self.name, None)
        else:
            shown = own.get(self.dict_name, {})
            shown[self.name] = self.owner._modules[self.name]
            if not any(isinstance(value, BlocksView) for value in shown.values()):
                own.pop(self.dict_name, None)
        is_own = isinstance(own.get("__getstate__"), _PlainState)
        if is_own and not any(map(_is_view, own.values())):
            del own["__getstate__"]

    @property
    def _shown_in(self) -> torch.nn.Module:
        return self.owner if self.dict_owner is None else self.dict_owner


class _PlainState:
    """What copies and pickles of a module are made of while it shows views: none of them."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(self) -> dict[str, Any]:
        own = self._module.__dict__.copy()
        return {k: v for k, v in own.items() if k != "__getstate__" and not _is_view(v)}


def _is_view(value: Any) -> bool:
    if type(value) is dict:
        return any(isinstance(entry, BlocksView) for entry in list(value.values()))
    return isinstance(value, BlocksView)


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


class Views:
    """The views of one model's lists, there for as long as any forward with a cache is under way.

    Forwards overlap where threads share the model: the first one shows the views, the last one
    hides them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forwards: Counter[Place] = Counter()

    def show(self, lists: Sequence[BlockList]) -> None:
        """Show views of `lists`: a forward begins."""
        with self._lock:
            for block_list in lists:
                self._forwards[block_list.place] += 1
                if self._forwards[block_list.place] == 1:
                    block_list.show()

    @staticmethod
    def clean(own: dict[str, Any]) -> dict[str, Any]:
        """Return the attributes of a module without the views among them."""
        return {name: value for name, value in own.items() if not _is_view(value)}

    def hide(self, lists: Sequence[BlockList]) -> None:
        """Hide views of `lists` that no other forward needs: a forward ends."""
        with self._lock:
            for block_list in lists:
                self._forwards[block_list.place] -= 1
                if self._forwards[block_list.place] < 1:
                    del self._forwards[block_list.place]
                    block_list.hide()
