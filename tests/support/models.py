"""A tiny real model of each transformer class in the table, and the inputs of one of its steps.

A case is data: the class, its config, and the shapes of what its forward takes. Weights and inputs
follow from seeds; float32 on the CPU, ten blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import tiny
import torch

BLOCKS = 10
TEXT = (1, tiny.TEXT_TOKENS, tiny.TEXT_DIM)


@dataclass(frozen=True)
class Case:
    """One transformer class.

    Attributes:
        lists: the block lists that the forward runs, in order; each chain of them is a stack.
        config: arguments of the class.
        latent: shape of `hidden_states`.
        tensors: shapes of the other float inputs.
        inputs: what else the forward takes.
        build: builds the model, where `config` does not.
    """

    lists: tuple[str, ...]
    latent: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], torch.nn.Module] | None = None


HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
FLUX_LISTS = ("transformer_blocks", "single_transformer_blocks")
FLUX_LIKE = {
    "in_channels": 16,
    "num_layers": 4,
    "num_single_layers": BLOCKS - 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": tiny.TEXT_DIM,
    "axes_dims_rope": (4, 6, 6),
}
FLUX_IDS = {
    "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
    "txt_ids": torch.zeros(tiny.TEXT_TOKENS, 3),
}

COGVIEW = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": BLOCKS,
    "text_embed_dim": tiny.TEXT_DIM,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "pos_embed_max_size": 8,
    "sample_size": 8,
}
COGVIEW_INPUTS = {
    "original_size": torch.tensor([[64.0, 64.0]]),
    "target_size": torch.tensor([[64.0, 64.0]]),
    "crop_coords": torch.zeros(1, 2),
}

CASES = {
    "FluxTransformer2DModel": Case(
        FLUX_LISTS,
        (1, 16, 16),
        tensors={"encoder_hidden_states": TEXT, "pooled_projections": (1, 12)},
        inputs=FLUX_IDS,
        build=tiny.flux,
    ),
    "QwenImageTransformer2DModel": Case(
        ("transformer_blocks",),
        (1, 16, 16),
        tensors={"encoder_hidden_states": TEXT},
        inputs={
            "img_shapes": [[(1, 4, 4)]],
            "encoder_hidden_states_mask": torch.ones(1, tiny.TEXT_TOKENS, dtype=torch.bool),
        },
        build=lambda: tiny.qwen(layers=BLOCKS),
    ),
    "WanTransformer3DModel": Case(
        ("blocks",),
        (1, 4, 2, 4, 4),
        tensors={"encoder_hidden_states": TEXT},
        build=lambda: tiny.wan(layers=BLOCKS),
    ),
    "CogVideoXTransformer3DModel": Case(
        ("transformer_blocks",),
        (1, 2, 4, 8, 8),
        HEADS
        | {
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": tiny.TEXT_DIM,
            "num_layers": BLOCKS,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": tiny.TEXT_TOKENS,
        },
        {"encoder_hidden_states": TEXT},
    ),
    "HunyuanVideoTransformer3DModel": Case(
        FLUX_LISTS,
        (1, 4, 2, 4, 4),
        HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "num_single_layers": BLOCKS - 4,
            "num_refiner_layers": 1,
            "guidance_embeds": False,
            "text_embed_dim": tiny.TEXT_DIM,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 4, 4),
        },
        {"encoder_hidden_states": TEXT, "pooled_projections": (1, 8)},
        {"encoder_attention_mask": torch.ones(1, tiny.TEXT_TOKENS, dtype=torch.bool)},
    ),
    "MochiTransformer3DModel": Case(
        ("transformer_blocks",),
        (1, 4, 2, 4, 4),
        HEADS
        | {
            "attention_head_dim": 8,
            "num_layers": BLOCKS,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": tiny.TEXT_DIM,
            "time_embed_dim": 4,
            "max_sequence_length": tiny.TEXT_TOKENS,
        },
        {"encoder_hidden_states": TEXT},
        {"encoder_attention_mask": torch.ones(1, tiny.TEXT_TOKENS, dtype=torch.bool)},
    ),
    "LTXVideoTransformer3DModel": Case(
        ("transformer_blocks",),
        (1, 16, 4),
        HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 24,
            "num_layers": BLOCKS,
            "caption_channels": tiny.TEXT_DIM,
        },
        {"encoder_hidden_states": TEXT},
        {
            "encoder_attention_mask": torch.ones(1, tiny.TEXT_TOKENS, dtype=torch.bool),
            "num_frames": 1,
            "height": 4,
            "width": 4,
        },
    ),
    "CogView4Transformer2DModel": Case(
        ("transformer_blocks",),
        (1, 4, 8, 8),
        COGVIEW | {"rope_axes_dim": (8, 8)},
        {"encoder_hidden_states": TEXT},
        COGVIEW_INPUTS,
    ),
    "PixArtTransformer2DModel": Case(
        ("transformer_blocks",),
        (1, 4, 8, 8),
        HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": BLOCKS,
            "cross_attention_dim": 24,
            "sample_size": 8,
            "caption_channels": tiny.TEXT_DIM,
            "use_additional_conditions": False,
        },
        {"encoder_hidden_states": TEXT},
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "CogView3PlusTransformer2DModel": Case(
        ("transformer_blocks",),
        (1, 4, 8, 8),
        COGVIEW,
        {"encoder_hidden_states": TEXT},
        COGVIEW_INPUTS,
    ),
    "BriaTransformer2DModel": Case(
        FLUX_LISTS,
        (1, 16, 16),
        FLUX_LIKE | {"pooled_projection_dim": 12},
        {"encoder_hidden_states": TEXT, "pooled_projections": (1, 12)},
        FLUX_IDS,
    ),
    "OvisImageTransformer2DModel": Case(
        FLUX_LISTS,
        (1, 16, 16),
        FLUX_LIKE | {"out_channels": 16},
        {"encoder_hidden_states": TEXT},
        FLUX_IDS,
    ),
    "LongCatImageTransformer2DModel": Case(
        FLUX_LISTS,
        (1, 16, 16),
        FLUX_LIKE | {"pooled_projection_dim": 12},
        {"encoder_hidden_states": TEXT},
        FLUX_IDS,
    ),
    "SanaTransformer2DModel": Case(
        ("transformer_blocks",),
        (1, 4, 4, 4),
        HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": BLOCKS,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": tiny.TEXT_DIM,
            "sample_size": 4,
        },
        {"encoder_hidden_states": TEXT},
    ),
}
"""Of each class of the table, by name."""

FROM_ONE = (
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "OvisImageTransformer2DModel",
    "LongCatImageTransformer2DModel",
)
"""Classes whose time runs from 1 to 0 rather than from 1000."""


@cache
def model(name: str) -> torch.nn.Module:
    """Return the tiny model of a class; the same one each time."""
    case = CASES[name]
    if case.build is not None:
        return case.build()
    return tiny.fill(getattr(diffusers, name)(**case.config), seed=3)


def run(name: str, steps: int, seeds: list[int] | None = None) -> list[torch.Tensor]:
    """Return the outputs of `steps` steps on inputs that follow from `seeds`, one per step.

    Without seeds the loop is closed: a part of each output goes into the next input.
    """
    case, transformer = CASES[name], model(name)
    x, outputs = tiny.noise(*case.latent, seed=5), []
    tensors = {key: tiny.noise(*s, seed=i) for i, (key, s) in enumerate(case.tensors.items(), 11)}
    for step in range(steps):
        if seeds is not None:
            x = tiny.noise(*case.latent, seed=seeds[step])
        t = 1 - (0 if seeds is not None else step / steps)
        time = torch.tensor([t if name in FROM_ONE else 1000 * t])
        with torch.no_grad():
            (output,) = transformer(
                hidden_states=x, timestep=time, return_dict=False, **tensors, **case.inputs
            )
        outputs.append(output)
        x = x - output[tuple(slice(0, n) for n in x.shape)] / steps
    return outputs
