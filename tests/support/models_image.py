"""Tiny models of the image families."""

import tiny
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
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


def ids(axes: int) -> torch.Tensor:
    """Return the positions of 4 x 4 image tokens; axes other than the second and third are 0."""
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return torch.nn.functional.pad(grid, (1, axes - 3))


FLUX_IDS = {
    "img_ids": ids(3),
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
    "SD3Transformer2DModel": Case(
        "transformer_blocks",
        (1, 4, 8, 8),
        HEADS
        | {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": BLOCKS,
            "joint_attention_dim": tiny.TEXT_DIM,
            "caption_projection_dim": 24,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 8,
        },
        {"encoder_hidden_states": TEXT, "pooled_projections": (1, 12)},
    ),
    "BriaFiboTransformer2DModel": Case(
        "transformer_blocks; single_transformer_blocks",
        (1, 16, 16),
        FLUX_LIKE | {"num_layers": 5, "num_single_layers": 5, "text_encoder_dim": 8},
        {"encoder_hidden_states": TEXT},
        FLUX_IDS
        | {"text_encoder_layers": [tiny.noise(*TEXT[:2], 8, seed=i) for i in range(BLOCKS)]},
    ),
    "AuraFlowTransformer2DModel": Case(
        "joint_transformer_blocks; single_transformer_blocks",
        (1, 4, 8, 8),
        HEADS
        | {
            "sample_size": 8,
            "num_mmdit_layers": 5,
            "num_single_dit_layers": 5,
            "joint_attention_dim": tiny.TEXT_DIM,
            "caption_projection_dim": 24,
            "pos_embed_max_size": 16,
        },
        {"encoder_hidden_states": TEXT},
        start=1.0,
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
    "LuminaNextDiT2DModel": Case(
        "layers",
        (1, 4, 8, 8),
        {
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": BLOCKS,
            "num_attention_heads": 4,
            "num_kv_heads": 4,
            "multiple_of": 8,
            "cross_attention_dim": tiny.TEXT_DIM,
        },
        {"encoder_hidden_states": TEXT},
        {
            "encoder_mask": text_mask(),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16),
            "cross_attention_kwargs": {},
        },
        start=1.0,
    ),
    "Lumina2Transformer2DModel": Case(
        "layers",
        (1, 4, 8, 8),
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": BLOCKS,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": tiny.TEXT_DIM,
        },
        {"encoder_hidden_states": TEXT},
        {"encoder_attention_mask": text_mask()},
        start=1.0,
    ),
    "OmniGenTransformer2DModel": Case(
        "layers",
        (1, 4, 8, 8),
        {
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": BLOCKS,
            "pad_token_id": 0,
            "vocab_size": 16,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 6, "long_factor": [1.0] * 6},
            "pos_embed_max_size": 8,
            "time_step_dim": 8,
        },
        inputs={
            "input_ids": torch.arange(6)[None],
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": None,
            "position_ids": torch.arange(6 + 1 + 16)[None],
        },
        start=1.0,
    ),
}
