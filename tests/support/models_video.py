"""Tiny models of the video families."""

import tiny
from model_case import BLOCKS, HEADS, TEXT, Case, text_mask

FLUX_BLOCKS = "transformer_blocks + single_transformer_blocks"

CASES = {
    "WanTransformer3DModel": Case(
        "blocks",
        (1, 4, 2, 4, 4),
        tensors={"encoder_hidden_states": TEXT},
        build=lambda: tiny.wan(layers=BLOCKS),
    ),
    "CogVideoXTransformer3DModel": Case(
        "transformer_blocks",
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
        FLUX_BLOCKS,
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
        {"encoder_attention_mask": text_mask()},
    ),
    "MochiTransformer3DModel": Case(
        "transformer_blocks",
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
        {"encoder_attention_mask": text_mask()},
    ),
    "LTXVideoTransformer3DModel": Case(
        "transformer_blocks",
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
            "encoder_attention_mask": text_mask(),
            "num_frames": 1,
            "height": 4,
            "width": 4,
        },
    ),
}
