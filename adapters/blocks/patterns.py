"""What a transformer block takes and returns: the six forward patterns."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

HIDDEN = "hidden_states"
ENCODER = "encoder_hidden_states"

Streams = tuple[str, str]
"""Names of a block's parameters that take its hidden states and its encoder states."""

STREAMS: Streams = (HIDDEN, ENCODER)


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

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of the streams that a block is called with."""
        return self.value[0]

    @property
    def returns(self) -> tuple[str, ...]:
        """Names of the streams that a block returns, in order."""
        return self.value[1]


class OutputForm:
    """How a block packs its streams into what it returns, learned from one real output.

    Attributes:
        is_tensor: the block returns `hidden_states` alone.
        hidden_at: position of `hidden_states` in the tuple.
        encoder_at: position of `encoder_hidden_states`, None where the pattern returns none. What
            is there may be None: from the last block of a model, or without audio.
    """

    __slots__ = ("encoder_at", "hidden_at", "is_tensor", "rest", "sequence")

    def __init__(self, pattern: ForwardPattern, output: Any, who: str) -> None:
        self.encoder_at: int | None = None
        self.hidden_at = 0
        self.rest: tuple[Any, ...] = ()
        self.sequence: type = type(output)
        self.is_tensor = isinstance(output, torch.Tensor)
        if self.is_tensor:
            fits = len(pattern.returns) == 1 or pattern.takes != (HIDDEN,)
        else:
            fits = isinstance(output, tuple | list) and self._match(pattern, output)
        if not fits:
            raise ValueError(
                f"{who}: a block of {pattern.name} must return ({', '.join(pattern.returns)}), got "
                f"{describe(output)}; give the BlockAdapter the pattern that the block follows"
            )

    def _match(self, pattern: ForwardPattern, output: Any) -> bool:
        """Find the streams in a tuple; say whether it fits the pattern."""
        if len(pattern.returns) == 2 and len(output) == 2:
            self.hidden_at = pattern.returns.index(HIDDEN)
            self.encoder_at = 1 - self.hidden_at
            if not isinstance(output[self.encoder_at], torch.Tensor | None):
                return False
        elif len(pattern.returns) == 2 or any(isinstance(x, torch.Tensor) for x in output[1:]):
            return False
        self.rest = tuple(None if isinstance(x, torch.Tensor) else x for x in output)
        return len(output) > 0 and isinstance(output[self.hidden_at], torch.Tensor)

    def unpack(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (hidden_states, encoder_hidden_states or None) of a block's output."""
        if self.is_tensor:
            return output, None
        encoder = output[self.encoder_at] if self.encoder_at is not None else None
        return output[self.hidden_at], encoder

    def pack(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> Any:
        """Return the streams as the block would."""
        if self.is_tensor:
            return hidden
        output = list(self.rest)
        output[self.hidden_at] = hidden
        if self.encoder_at is not None:
            output[self.encoder_at] = encoder
        return tuple(output) if self.sequence is tuple else output


def describe(value: Any) -> str:
    """Return a short text that says what `value` is."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)} ({', '.join(map(describe, value))})"
    return type(value).__name__ if value is not None else "None"
