"""Gradients of predictions: they go on to what came into the blocks that were skipped."""

from __future__ import annotations

from typing import Any

import torch

Streams = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states, and encoder states where there are any."""


class _Followed(torch.autograd.Function):
    """A prediction whose gradient goes to what it was added to."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def followed(step: Any, given: Streams, made: Any) -> Streams:
    """Return what a step predicted; gradients go on to what came into the skipped blocks.

    The step notes whether these were called where gradients are off: `hides_gradients`.
    """
    step.hides_gradients = not torch.is_grad_enabled()
    hidden, encoder = (
        y if x is None or y is None else _Followed.apply(x, y)
        for x, y in zip(given, made, strict=True)
    )
    return hidden, encoder
