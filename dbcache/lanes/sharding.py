"""What the cache asks of ranks that share a transformer (`dbcache.parallel` answers)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

Vote = Callable[..., torch.Tensor]
"""As `Sharding.vote`."""


class Sharding(Protocol):
    """One transformer that ranks share.

    It is spread by dbcache (`dbcache.parallel.handle.Parallelized`), or by others, or not at all
    (`dbcache.parallel.together.Together`).
    """

    spreads: bool
    """Whether `install` changes the transformer."""

    @property
    def votes(self) -> bool:
        """Whether a decision takes a vote, as far as is known."""

    @property
    def sees_whole(self) -> bool:
        """Whether each rank is given the latents of all, so that what they tell needs no vote."""

    splits_guidance: bool
    """Whether a rank runs only one of two guidance branches."""

    def meet(self, facts: Callable[[], Mapping[str, str]], device: torch.device) -> None:
        """See which ranks there are as a request begins; raise unless all begin it alike."""

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
