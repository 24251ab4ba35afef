"""Tiny models of FLUX and of the families that are built like it."""

import tiny
import torch
from model_case import BLOCKS, TEXT, Case, text_mask

FLUX_BLOCKS = "transformer_blocks + single_transformer_blocks"
FLUX_LIKE = {
    "in_channels": 16,
    "num_layers": 4,
    "num_single_layers": BLOCKS - 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": tiny.TEXT_DIM,
    "axes_dims_rope": (4, 6, 6),
}


def ids(axes: int) -> torch.Tensor:
    """Return the positions of 4 x 4 image tokens; axes other than the second and third are 0."""
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return torch.nn.functional.pad(grid, (1, axes - 3))


FLUX_IDS = {
    "img_ids": ids(3),
    "txt_ids": torch.zeros(tiny.TEXT_TOKENS, 3),
}

CASES = {
    "FluxTransformer2DModel": Case(
        FLUX_BLOCKS,
        (1, 16, 16),
        tensors={"encoder_hidden_states": TEXT, "pooled_projections": (1, 12)},
        inputs=FLUX_IDS,
        build=tiny.flux,
        start=1.0,
    ),
    "QwenImageTransformer2DModel": Case(
        "transformer_blocks",
        (1, 16, 16),
        tensors={"encoder_hidden_states": TEXT},
        inputs={
            "img_shapes": [[(1, 4, 4)]],
            "encoder_hidden_states_mask": text_mask(),
        },
        build=lambda: tiny.qwen(layers=BLOCKS),
        start=1.0,
    ),
    "BriaTransformer2DModel": Case(
        FLUX_BLOCKS,
        (1, 16, 16),
        FLUX_LIKE | {"pooled_projection_dim": 12},
        {"encoder_hidden_states": TEXT, "pooled_projections": (1, 12)},
        FLUX_IDS,
    ),
    "OvisImageTransformer2DModel": Case(
        FLUX_BLOCKS,
        (1, 16, 16),
        FLUX_LIKE | {"out_channels": 16},
        {"encoder_hidden_states": TEXT},
        FLUX_IDS,
        start=1.0,
    ),
    "LongCatImageTransformer2DModel": Case(
        FLUX_BLOCKS,
        (1, 16, 16),
        FLUX_LIKE | {"pooled_projection_dim": 12},
        {"encoder_hidden_states": TEXT},
        FLUX_IDS,
        start=1.0,
    ),
    "Flux2Transformer2DModel": Case(
        "transformer_blocks; single_transformer_blocks",
        (1, 16, 16),
        {
            "in_channels": 16,
            "num_layers": 5,
            "num_single_layers": 5,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": tiny.TEXT_DIM,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
            "guidance_embeds": False,
        },
        {"encoder_hidden_states": TEXT},
        {"img_ids": ids(4), "txt_ids": torch.zeros(tiny.TEXT_TOKENS, 4)},
        start=1.0,
    ),
    "BriaFiboTransformer2DModel": Case(
        "transformer_blocks; single_transformer_blocks",
        (1, 16, 16),
        FLUX_LIKE | {"num_layers": 5, "num_single_layers": 5, "text_encoder_dim": 8},
        {"encoder_hidden_states": TEXT},
        FLUX_IDS
        | {"text_encoder_layers": [tiny.noise(*TEXT[:2], 8, seed=i) for i in range(BLOCKS)]},
    ),
    "ChromaTransformer2DModel": Case(
        "transformer_blocks; single_transformer_blocks",
        (1, 16, 16),
        FLUX_LIKE
        | {
            "num_layers": 5,
            "num_single_layers": 5,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 2,
        },
        {"encoder_hidden_states": TEXT},
        FLUX_IDS,
        start=1.0,
    ),
    "Flux3Transformer2DModel": Case(
        "mode_blocks.image; mode_blocks.image_cond; single_transformer_blocks",
        (1, 16, 16),
        {
            "in_channels": 16,
            "cond_in_channels": 8,
            "num_layers": 4,
            "num_single_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": tiny.TEXT_DIM,
            "timestep_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        {"encoder_hidden_states": TEXT, "image_cond_hidden_states": (1, 8, 8)},
        {
            "img_ids": ids(4),
            "image_cond_ids": ids(4)[:8],
            "txt_ids": torch.zeros(tiny.TEXT_TOKENS, 4),
        },
        start=1.0,
    ),
}
