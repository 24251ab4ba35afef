"""Whether blocks write into their inputs, so that what they were given must be copied before."""

from __future__ import annotations

import torch

Pairs = list[tuple[torch.Tensor | None, torch.Tensor | None]]
"""Tensors that blocks were given, each with its copy from before."""


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

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `x` holds now, whatever the blocks do to it."""
        return x.clone() if self.are_needed else x

    def learn(self, pairs: Pairs) -> None:
        """Compare what blocks were given with the copies from before; reads from the device."""
        if not self.is_known:
            self.are_needed = not all(
                torch.equal(x, copy) for x, copy in pairs if x is not None and copy is not None
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
