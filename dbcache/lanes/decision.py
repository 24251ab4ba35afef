"""One decision of a step, for work that is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a decision lies on the device, and how the host takes part in it.

    Attributes:
        flag: int32, one element, on the device: 1 cached, 0 full.
        read: counts the step and returns the decision; waits for the device where it was asked.
        count: counts the step without knowing how it was decided.

    Both take it that the step will leave a reference, as full ones and cached ones do.
    """

    flag: torch.Tensor
    read: Callable[[], bool]
    count: Callable[[], object]


def nothing() -> None:
    """Count nothing: another decision of the step does."""


def decisions_on_blocks(
    flags: torch.Tensor, read: Callable[[], list[bool]], count: Callable[[], object] = nothing
) -> list[Decision]:
    """Return the decisions on single blocks, of which the first one reads, or counts, for all.

    Args:
        flags: int32 (M,), on the device: 1 for a block that is left out.
        read: counts the step and returns which blocks are left out.
        count: counts the step without knowing it.
    """
    skipped: list[bool] = []

    def read_one(index: int) -> bool:
        if index == 0:
            skipped[:] = read()
        return skipped[index]

    return [
        Decision(flags[i : i + 1], partial(read_one, i), nothing if i else count)
        for i in range(len(flags))
    ]
