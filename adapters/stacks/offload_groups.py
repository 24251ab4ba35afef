"""Blocks that diffusers' group offloading moves together, where some of a group are left out.

The first block of a group loads the weights of all before it runs, and the last one puts them back
after it has run. So a group whose first block is left out must be loaded by someone else if any
other block of it runs, and one whose last block is left out be put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dbcache.adapters.blocks.signature import unwrap

HOOK = "group_offloading"
"""Name of the hook in the registry that diffusers keeps in a module's `_diffusers_hook`."""

Skips = Callable[[int], bool]


class OffloadGroups:
    """The groups of a stack that have several blocks.

    Args:
        groups: each with the positions of its blocks in the stack, in their order.
    """

    def __init__(self, groups: list[tuple[Any, list[int]]]) -> None:
        self._groups = groups

    @classmethod
    def of(cls, blocks: list[torch.nn.Module]) -> OffloadGroups | None:
        """Return the groups of `blocks`, None without such groups."""
        found: dict[int, tuple[Any, list[int]]] = {}
        for position, block in enumerate(blocks):
            registry = unwrap(block).__dict__.get("_diffusers_hook")
            hook = None if registry is None else registry.get_hook(HOOK)
            if hook is not None:
                found.setdefault(id(hook.group), (hook.group, []))[1].append(position)
        several = [pair for pair in found.values() if len(pair[1]) > 1]
        return cls(several) if several else None

    def load(self, skips: Skips) -> None:
        """Load what blocks need that run although the first one of their group is left out.

        Args:
            skips: says whether the block at a position is left out.
        """
        for group, positions in self._groups:
            if skips(positions[0]) and not all(map(skips, positions)):
                group.onload_()

    def free(self, skips: Skips) -> None:
        """Put back what blocks needed that ran although the last one of their group is left out."""
        for group, positions in self._groups:
            if skips(positions[-1]) and not all(map(skips, positions)):
                group.offload_()
