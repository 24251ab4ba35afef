"""Where a model's forward looks its blocks up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Entry = Callable[..., Any]
"""What a model's loop calls in place of a block, or the block itself."""

Place = tuple[int, str]
"""Identity of a module and the name under which it holds a list of blocks."""

WHOLE = slice(None)


class BlockList:
    """One list of blocks, or a part of one, and where the model's forward looks it up.

    A copy is another one of the same list, which notices by itself that blocks are others.

    Args:
        transformer: the model.
        path: name of the list seen from the transformer, as in ``"transformer_blocks"``. It may end
            in ``[:-n]`` or ``[-n:]``: all but the last n blocks, or these, n being an attribute of
            the transformer.

    Attributes:
        blocks: as last read.
        seen: all that the whole list held then.
        shown_in: the module in whose attributes the model looks the list up, or the `ModuleDict`
            that holds the list, and the name there.

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
        self.shown_in = self.owner, self.name
        if isinstance(self.owner, torch.nn.ModuleDict):
            outer, _, name = owner.rpartition(".")
            self.shown_in = _submodule(transformer, outer), name
        self.read()

    def read(self) -> None:
        """Read which blocks the model has now."""
        self.seen = [*self.owner._modules[self.name]._modules.values()]  # type: ignore[union-attr]
        self.blocks = self.whole()[self.part]

    def whole(self) -> list[torch.nn.Module]:
        """Return what the whole list holds, past a view of it."""
        held: Any = self.owner._modules[self.name]
        return [block for block in held._modules.values() if block is not None]


def _submodule(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """Return a module within another, past the views that forwards in other threads are shown."""
    for name in filter(None, path.split(".")):
        module = module._modules.get(name) or module.get_submodule(name)
    return module
