"""TeaCache's signal: the modulated input of the first block, by class of the block.

It is made of the block's arguments before the block runs (and a cached step does not run it), so
each class of blocks needs to be known: a row says which of its modules make it. A new family is one
more row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def _first_norm(block: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """Adaptive layer norms: they return what enters the attention first."""
    return block.norm1(hidden_states, emb=temb)[0]


def _qwen_norm(block: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """The image stream's norm, shifted and scaled by the first third of its modulation."""
    shift, scale = block.img_mod(temb).chunk(6, dim=-1)[:2]
    return block.img_norm1(hidden_states) * (1 + scale[:, None]) + shift[:, None]


def _time(block: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """The embedding of the timestep alone, as TeaCache takes it for these models."""
    return temb


MODULATED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "FluxTransformerBlock": _first_norm,
    "HunyuanVideoTransformerBlock": _first_norm,
    "BriaTransformerBlock": _first_norm,
    "MochiTransformerBlock": _first_norm,
    "QwenImageTransformerBlock": _qwen_norm,
    "CogVideoXBlock": _time,
    "WanTransformerBlock": _time,
}
"""How to make the signal, (B, ...), by class name of the first block."""
