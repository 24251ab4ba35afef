"""What a row of the kernel benchmark is, and how its inputs are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.shapes import DTYPES, Shape
from dbcache.kernels.common.select import Backend

Inputs = dict[str, Any]
Outputs = tuple[torch.Tensor | bool | None, ...]


class Draw:
    """Makes the inputs: the same normal random numbers each time, on one device."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        """Return random numbers of mean 0 and standard deviation `scale`."""
        x = torch.empty(size, dtype=dtype, device=self.device)
        return x.normal_(0.0, scale, generator=self.generator)

    def hidden(self, shape: Shape, scale: float = 1.0) -> torch.Tensor:
        """Return hidden states of `shape`."""
        size = (shape.batch, shape.hidden, shape.width)
        return self.normal(*size, dtype=DTYPES[shape.dtype], scale=scale)

    def encoder(self, shape: Shape, scale: float = 1.0) -> torch.Tensor | None:
        """Return encoder states of `shape`, or None if it has none."""
        if not shape.encoder:
            return None
        size = (shape.batch, shape.encoder, shape.width)
        return self.normal(*size, dtype=DTYPES[shape.dtype], scale=scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOp:
    """One row: an op, how to call it, and what it is compared with."""

    name: str
    make: Callable[[Shape, Draw], Inputs]
    """Return one set of inputs and outputs; the timed calls rotate through several."""
    call: Callable[[Inputs, Backend], Outputs]
    """Run the op on a set with ``impl="triton"`` or ``"reference"``; return what it produced."""
    eager: Callable[[Inputs], Outputs]
    """The peers' PyTorch sequence for the same; it changes nothing in the set."""
    moved: Callable[[Shape], int] | None
    """Bytes that must move: each input read once, each output written once. None for an op that
    moves next to nothing, whose time is that of a launch."""
    results: Callable[[Inputs, Outputs], Outputs] = lambda _, outputs: outputs
    """Turn what `call` left in the set and returned into what is compared with its reference. The
    first of it are compared with what `eager` returned."""
    eager_tolerance: float = 0.05
    """Largest relative difference of `eager`, which rounds more often."""
    eager_results: Callable[[Inputs, Outputs], Outputs] = lambda _, outputs: outputs
    """As `results`, for what `eager` returned."""
    tuned: tuple[str, int] | None = None
    """What `--tune` chooses a config for: an op of `launches.CONFIGS`, and the slots of the ring
    where they matter."""
    eager_waits: bool = False
    """The peers' sequence reads a value on the host: it waits, and it can be neither compiled
    nor captured."""
