"""What the cache asks of a transformer that is spread over ranks (`dbcache.parallel` answers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Sharding(Protocol):
    """One transformer spread over ranks; see `dbcache.parallel.handle.Parallelized`."""

    splits_sequence: bool
    """Whether a rank has only a part of the tokens, so that a decision takes a vote."""

    splits_guidance: bool
    """Whether a rank runs only one of two guidance branches."""

    def install(self) -> None:
        """Spread the transformer; does nothing where it is."""

    def remove(self) -> None:
        """Undo it."""

    def new_request(self) -> Callable[[str | None, Callable[[], Any]], Any] | None:
        """Return what runs the calls of a request, here or on the rank of their guidance branch.

        The function takes the branch and what runs its call here, and returns the output. None
        where each rank runs all branches.
        """

    def split_input(self, path: str, x: torch.Tensor, name: str = "hidden_states") -> torch.Tensor:
        """Return this rank's part of the input `name` of the block `path`, if it is split there."""

    def vote(self, partials: torch.Tensor, *, per_sample: bool) -> torch.Tensor:
        """Return the sums of a step's change, (B, T, 2 or 4), over the ranks of a sequence."""
