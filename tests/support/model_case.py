"""How a tiny model of a transformer class and the inputs of its steps are described: as data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import tiny
import torch

BLOCKS = 10
TEXT = (1, tiny.TEXT_TOKENS, tiny.TEXT_DIM)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
STREAMS = ("hidden_states", "encoder_hidden_states")


@dataclass(frozen=True)
class Case:
    """One transformer class.

    Attributes:
        blocks: the block lists in the order of the forward; ``+`` joins the lists of a stack, ``;``
            separates stacks. Written down independently of the table of models.
        latent: shape of the latent.
        config: arguments of the class.
        tensors: shapes of the other float inputs.
        inputs: what else the forward takes.
        build: builds the model, where `config` does not.
        hidden: name of the parameter that takes the latent.
        time: name of the parameter that takes the time.
        start: the time of the first step; it falls to 0.
        arguments: takes (latent, time, tensors) and returns what the forward takes in addition to
            `inputs`, where it is not the latent, the time and the tensors under their names.
        streams: names of the streams' parameters of the blocks of a list, where they are not
            hidden_states and encoder_hidden_states.
        long_skips: the last blocks take what the first ones made, so that no more of them can be
            kept running than of the first.
    """

    blocks: str
    latent: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], torch.nn.Module] | None = None
    hidden: str = "hidden_states"
    time: str = "timestep"
    start: float = 1000.0
    arguments: Callable[..., dict[str, Any]] | None = None
    streams: dict[str, tuple[str, ...]] = field(default_factory=dict)
    long_skips: bool = False

    @property
    def stacks(self) -> list[list[str]]:
        """Paths of the lists of each stack."""
        return [[p.strip() for p in stack.split("+")] for stack in self.blocks.split(";")]

    def call_arguments(self, x: torch.Tensor, time: torch.Tensor) -> dict[str, Any]:
        """Return what the forward takes at one step."""
        shapes = enumerate(self.tensors.items(), 11)
        tensors = {name: tiny.noise(*shape, seed=i) for i, (name, shape) in shapes}
        if self.arguments is not None:
            return self.inputs | self.arguments(x, time, tensors)
        return self.inputs | tensors | {self.hidden: x, self.time: time}


def find_class(name: str) -> type | None:
    """Return a transformer class of the installed diffusers, None where it lacks it.

    What follows a comma in the name tells variants of a class apart.
    """
    name = name.partition(",")[0]
    for part in (diffusers, diffusers.models, diffusers.models.transformers):
        if hasattr(part, name):
            return getattr(part, name)
    return None


def text_mask(dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """Return a mask that keeps all tokens of the text."""
    return torch.ones(TEXT[:2], dtype=dtype)
