"""The shapes and dtypes in which a lane keeps streams: those in which the blocks return them.

Blocks may be given others: under autocast, or in a model of mixed precision, the first blocks
change the dtype, and the first block may repeat what is the same for all samples of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dbcache.kernels.common.select import DTYPES
from dbcache.lanes.buffers import Layout, Streams

Dtypes = tuple[torch.dtype, torch.dtype | None]
"""Of the hidden states, and of the encoder states; None where blocks return none."""


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which kernels work on values of `dtype`: float64 counts as float32."""
    return dtype if dtype in DTYPES else torch.float32


def widened(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return `x` repeated along its dimensions of size 1, as far as that leads to `shape`."""
    fits = x.ndim == len(shape) and all(a in (1, b) for a, b in zip(x.shape, shape, strict=True))
    return x.expand(*shape) if fits else x


def returned_as(dtypes: Dtypes, hidden: torch.Tensor, encoder: torch.Tensor | None) -> Streams:
    """Return the streams as the blocks would; one of which no dtype is known as it is."""
    return hidden.to(dtypes[0]), None if encoder is None else encoder.to(dtypes[1])


class Forms:
    """The dtypes of a lane's streams, learned from a full step of each layout.

    Attributes:
        seen: dtypes that the blocks returned last; None before they have.
        hidden: dtype in which the lane works on hidden states.
        encoder: dtype in which it works on encoder states.
        returned: dtypes that the blocks return where these differ from both, else None.
    """

    def __init__(self) -> None:
        self._known: dict[Layout | None, Dtypes] = {}
        self.seen: Dtypes | None = None
        self._layout: Layout | None = None
        self.hidden: torch.dtype = torch.float32
        self.encoder: torch.dtype | None = None
        self.returned: Dtypes | None = None

    def take(self, layout: Layout) -> None:
        """Go on with steps of a layout."""
        self._layout, self.seen = layout, None
        if layout in self._known:
            self._use(self._known[layout])

    def learn(self, seen: Dtypes) -> bool:
        """Note what the blocks return; say whether it is the first time for the layout."""
        is_first = self.seen is None
        self._known[self._layout] = seen
        self._use(seen)
        return is_first

    def _use(self, seen: Dtypes) -> None:
        hidden, encoder = self.seen = seen
        self.hidden = stored_dtype(hidden)
        self.encoder = None if encoder is None else stored_dtype(encoder)
        self.returned = seen if seen != (self.hidden, self.encoder) else None
