"""Which adapters of LoRA a transformer has, and how strong they are.

What was stored under others does not hold. diffusers and PEFT keep the names in the `peft_config`
of the model; only where that is, a layer or two of each block are asked for the rest, on each step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

CONFIG = "peft_config"
"""Attribute of a model with adapters: their configs by name."""

DIGITS = 9
"""Of a scale, after the point."""

CHANGED = "the adapters of LoRA changed"
"""Reason of a full step, in summaries."""


class Adapters:
    """The adapters that the steps of a request ran with.

    Attributes:
        are_known: there were some at the last step.
    """

    def __init__(self) -> None:
        self.are_known = False
        self._state: Any = None
        self._names: Any = None
        self._layers: list[Any] = []

    def have_changed(self, model: torch.nn.Module, lists: Iterable[Any], calls: int) -> bool:
        """Say whether they are others than at the last step, or not as strong.

        Args:
            model: the transformer.
            lists: the lists of its blocks.
            calls: of the image so far; its first step has none before it.
        """
        names = tuple(vars(model).get(CONFIG) or ())
        if names != self._names:
            self._names, self._layers = names, _layers([block_list.blocks for block_list in lists])
        state = [(names, _state(layer)) for layer in self._layers] or None
        before, self._state = self._state, state
        self.are_known = state is not None
        return calls > 0 and before != state


def _layers(lists: Sequence[Sequence[torch.nn.Module]]) -> list[Any]:
    """Return layers of each block, in which all adapters of the block are."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    found: list[Any] = []
    for block in (block for blocks in lists for block in blocks if tuners is not None):
        known: set[str] | None = None
        for layer in block.modules():
            if isinstance(layer, tuners.BaseTunerLayer):  # type: ignore[union-attr]
                names = set(getattr(layer, "scaling", None) or ())
                if known is None or not names <= known:
                    found.append(layer)
                    known = names | (known or set())
    return found


def _state(layer: Any) -> tuple[Any, ...]:
    """Return what a layer makes of its adapters.

    A scale that diffusers puts on for each call and takes off again leaves the last bit another.
    """
    active = getattr(layer, "active_adapters", ())
    scaling = getattr(layer, "scaling", None) or {}
    return (
        tuple(active),
        {k: round(v, DIGITS) if isinstance(v, int | float) else v for k, v in scaling.items()},
        tuple(getattr(layer, "merged_adapters", ())),
        getattr(layer, "disable_adapters", False),
    )
