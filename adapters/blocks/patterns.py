"""What a transformer block takes and returns: the six forward patterns."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import torch

HIDDEN = "hidden_states"
ENCODER = "encoder_hidden_states"


class Streams(NamedTuple):
    """Names of a block's parameters that take its hidden states and its encoder states."""

    hidden: str = HIDDEN
    encoder: str = ENCODER


STREAMS = Streams()


class ForwardPattern(Enum):
    """Inputs and outputs of a block, as (takes, returns).

    The names follow cache-dit's numbers; each has a telling alias.
    """

    Pattern_0 = ((HIDDEN, ENCODER), (HIDDEN, ENCODER))
    Pattern_1 = ((HIDDEN, ENCODER), (ENCODER, HIDDEN))
    Pattern_2 = ((HIDDEN, ENCODER), (HIDDEN,))
    Pattern_3 = ((HIDDEN,), (HIDDEN,))
    Pattern_4 = ((HIDDEN,), (HIDDEN, ENCODER))
    Pattern_5 = ((HIDDEN,), (ENCODER, HIDDEN))

    HIDDEN_ENCODER_TO_HIDDEN_ENCODER = Pattern_0
    HIDDEN_ENCODER_TO_ENCODER_HIDDEN = Pattern_1
    HIDDEN_ENCODER_TO_HIDDEN = Pattern_2
    HIDDEN_TO_HIDDEN = Pattern_3
    HIDDEN_TO_HIDDEN_ENCODER = Pattern_4
    HIDDEN_TO_ENCODER_HIDDEN = Pattern_5

    @staticmethod
    def supported_patterns() -> list[ForwardPattern]:
        """Return all of them."""
        return list(ForwardPattern)

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of the streams that a block is called with."""
        return self.value[0]

    @property
    def returns(self) -> tuple[str, ...]:
        """Names of the streams that a block returns, in order."""
        return self.value[1]

    In, Out = takes, returns


Pattern_0, Pattern_1, Pattern_2, Pattern_3, Pattern_4, Pattern_5 = list(ForwardPattern)


def describe(value: Any) -> str:
    """Return a short text that says what `value` is."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)} ({', '.join(map(describe, value))})"
    return type(value).__name__ if value is not None else "None"
