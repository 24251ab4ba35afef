"""Where a model's forward looks its blocks up, and how something else is put there."""

from __future__ import annotations

import torch

from dbcache.adapters.stacks.proxies import Guard

Entry = Guard | torch.nn.Module
WHOLE = slice(None)


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
        self.owner = transformer.get_submodule(owner)
        transformer.get_submodule(whole)
        self.part = WHOLE
        if part:
            split = len(self._all()) - getattr(transformer, part.strip(":-]"))
            self.part = slice(split) if part.startswith(":") else slice(split, None)
        self._dict_owner: torch.nn.Module | None = None
        if isinstance(self.owner, torch.nn.ModuleDict):
            outer, _, self._dict_name = owner.rpartition(".")
            self._dict_owner = transformer.get_submodule(outer)
        self.blocks = self.current()

    def _all(self) -> list[torch.nn.Module]:
        """Return what the whole list holds, past anything that shadows it."""
        blocks = self.owner._modules[self.name]
        assert blocks is not None
        return [block for block in blocks._modules.values() if block is not None]

    def current(self) -> list[torch.nn.Module]:
        """Return the blocks that the model has now."""
        return self._all()[self.part]

    def shadow(self, entries: list[Entry]) -> None:
        """Let the model see `entries` in place of its blocks."""
        if self._dict_owner is None:
            own = self.owner.__dict__
            if self.part is not WHOLE:  # the other part may be shadowed already
                whole: list[Entry] = own.get(self.name) or [*self._all()]
                whole[self.part] = entries
                entries = whole
            own[self.name] = entries
        else:  # looked up by key, past any entry in __dict__: the dictionary as a whole is replaced
            own = self._dict_owner.__dict__
            own.setdefault(self._dict_name, dict(self.owner._modules))[self.name] = entries

    def unshadow(self) -> None:
        """Let the model see its blocks again."""
        if self._dict_owner is None:
            self.owner.__dict__.pop(self.name, None)
        else:
            self._dict_owner.__dict__.pop(self._dict_name, None)
