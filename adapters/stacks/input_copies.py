"""Whether blocks write into their inputs, so that what they were given must be copied before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Streams = Sequence[torch.Tensor | None]
"""Tensors that blocks are given, or their copies from before."""


class InputCopies:
    """Copies what blocks are given, until a first run shows that they leave it as it is.

    Attributes:
        is_known: a run has shown it.
        are_needed: the blocks write into their inputs, or that is not known yet.
    """

    __slots__ = ("are_needed", "is_known")

    def __init__(self) -> None:
        self.is_known = False
        self.are_needed = True

    def of(self, given: Streams) -> Any:
        """Return what the tensors hold now, whatever the blocks do to them."""
        if not self.are_needed:
            return given
        return tuple(x if x is None else x.clone() for x in given)

    def learn(self, given: Streams, copies: Streams) -> None:
        """Compare what blocks were given with the copies from before; reads from the device."""
        if not self.is_known:
            pairs = zip(given, copies, strict=True)
            self.are_needed = not all(
                torch.equal(x, y) for x, y in pairs if x is not None and y is not None
            )
            self.is_known = True


class KnownLoop(InputCopies):
    """What a first full step shows of a model's loop, for one set of inputs of the model.

    As `InputCopies`: whether the loop writes into what the last probe block returned.

    Attributes:
        is_seen: such a step has run, by proxies alone.
        reads_blocks: the loop reads attributes of the blocks, which a function does not have.
    """

    __slots__ = ("is_seen", "reads_blocks")

    def __init__(self) -> None:
        super().__init__()
        self.is_seen = self.reads_blocks = False
