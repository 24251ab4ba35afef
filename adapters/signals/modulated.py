"""TeaCache's signal: the modulated input of the first block, by class of the block.

It is made of the block's arguments before the block runs (and a cached step does not run it), so
each class of blocks needs to be known: a row says which of its modules make it. A new family is one
more row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dbcache.adapters.blocks.signature import parameter_names, unwrap

Arguments = dict[str, Any]


def _first_norm(block: Any, arguments: Arguments) -> torch.Tensor:
    """Adaptive layer norms: they return what enters the attention first."""
    return block.norm1(arguments["hidden_states"], arguments["temb"])[0]


def _flux_norm(block: Any, arguments: Arguments) -> torch.Tensor:
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


def _qwen_norm(block: Any, arguments: Arguments) -> torch.Tensor:
    """The image stream's norm, shifted and scaled by the first third of its modulation."""
    shift, scale = block.img_mod(arguments["temb"]).chunk(6, dim=-1)[:2]
    normed = block.img_norm1(arguments["hidden_states"])
    return normed * (1 + scale[:, None]) + shift[:, None]


def _time(block: Any, arguments: Arguments) -> torch.Tensor:
    """The embedding of the timestep alone, as TeaCache takes it for these models."""
    return arguments["temb"]


MODULATED: dict[str, Callable[[Any, Arguments], torch.Tensor]] = {
    "FluxTransformerBlock": _flux_norm,
    "HunyuanVideoTransformerBlock": _flux_norm,
    "BriaTransformerBlock": _flux_norm,
    "MochiTransformerBlock": _first_norm,
    "QwenImageTransformerBlock": _qwen_norm,
    "CogVideoXBlock": _time,
    "WanTransformerBlock": _time,
}
"""How to make the signal, by class name of the first block."""


def modulated_input(block: Any, args: tuple[Any, ...], kwargs: Arguments) -> torch.Tensor:
    """Return the signal, from what the first block was called with; any shape (B, ...)."""
    plain = unwrap(block)
    arguments = dict(zip(parameter_names(block), args, strict=False)) | kwargs
    return MODULATED[type(plain).__name__](plain, arguments)


def check_block(block: torch.nn.Module, who: str) -> None:
    """Raise a ValueError if the signal of this class of blocks is not known."""
    name = type(unwrap(block)).__name__
    if name not in MODULATED:
        raise ValueError(
            f"{who}: policy='teacache' must know how the first block modulates its input, got a "
            f"{name}; known are {', '.join(sorted(MODULATED))}; choose another policy"
        )
