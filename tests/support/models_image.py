"""Tiny models of the image families."""

import tiny
import torch
from model_case import BLOCKS, HEADS, TEXT, Case, text_mask

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
    "CogView3PlusTransformer2DModel": Case(
        "transformer_blocks",
        (1, 4, 8, 8),
        COGVIEW,
        {"encoder_hidden_states": TEXT},
        COGVIEW_INPUTS,
    ),
    "CogView4Transformer2DModel": Case(
        "transformer_blocks",
        (1, 4, 8, 8),
        COGVIEW | {"rope_axes_dim": (8, 8)},
        {"encoder_hidden_states": TEXT},
        COGVIEW_INPUTS,
    ),
    "PixArtTransformer2DModel": Case(
        "transformer_blocks",
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
    "SanaTransformer2DModel": Case(
        "transformer_blocks",
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
}
