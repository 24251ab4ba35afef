"""One decision of a step, for work that is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
