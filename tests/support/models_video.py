"""Tiny models of the video families."""

import tiny
import torch
from model_case import BLOCKS, HEADS, TEXT, Case, text_mask

FLUX_BLOCKS = "transformer_blocks + single_transformer_blocks"
TEXT_INPUT = {"encoder_hidden_states": TEXT}
LATENT = (1, 4, 2, 4, 4)  # batch, channels, frames, height, width
PLACES = torch.cartesian_prod(*[torch.arange(2)] * 3)  # of its patches, at a patch size of 2

CHANNELS = {"in_channels": 4, "out_channels": 4}
WAN = (
    HEADS
    | CHANNELS
    | {
        "text_dim": tiny.TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": BLOCKS,
        "rope_max_seq_len": 32,
    }
)
ROPE = {"rope_axes_dim": (4, 4, 4)}
HUNYUAN = (
    HEADS
    | CHANNELS
    | ROPE
    | {
        "num_layers": 4,
        "num_single_layers": BLOCKS - 4,
        "num_refiner_layers": 1,
        "text_embed_dim": tiny.TEXT_DIM,
        "pooled_projection_dim": 8,
        "guidance_embeds": False,
    }
)
COGVIDEO = (
    HEADS
    | CHANNELS
    | {
        "attention_head_dim": 16,
        "time_embed_dim": 8,
        "text_embed_dim": tiny.TEXT_DIM,
        "num_layers": BLOCKS,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": tiny.TEXT_TOKENS,
    }
)
KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": tiny.TEXT_DIM,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_visual_blocks": BLOCKS,
    "axes_dims": (4, 4, 4),
}


def turns(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of a rotary embedding."""
    angles = torch.outer(torch.arange(float(tokens)), torch.arange(1.0, width / 2 + 1)) / 10
    return angles.cos().tile(1, 2), angles.sin().tile(1, 2)


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
    "WanVACETransformer3DModel": Case(
        "blocks",
        LATENT,
        WAN | {"vace_layers": [0, 2, 5, 9], "vace_in_channels": 8},
        TEXT_INPUT | {"control_hidden_states": (1, 8, 2, 4, 4)},
    ),
    "WanAnimateTransformer3DModel": Case(
        "blocks",
        LATENT,
        WAN
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        TEXT_INPUT
        | {
            "encoder_hidden_states_image": (1, 3, 16),
            "pose_hidden_states": (1, 4, 1, 4, 4),
            "face_pixel_values": (1, 3, 4, 16, 16),
            "reference": (1, 8, 2, 4, 4),
        },
        arguments=lambda x, time, tensors: (
            tensors
            | {"hidden_states": torch.cat([x, tensors.pop("reference")], 1), "timestep": time}
        ),
    ),
    "ChronoEditTransformer3DModel": Case("blocks", LATENT, WAN, TEXT_INPUT),
    "SkyReelsV2Transformer3DModel": Case("blocks", LATENT, WAN, TEXT_INPUT),
    "HeliosTransformer3DModel": Case(
        "blocks",
        (1, 4, 2, 8, 8),
        {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
        TEXT_INPUT
        | {
            "latents_history_short": (1, 4, 1, 8, 8),
            "latents_history_mid": (1, 4, 2, 8, 8),
            "latents_history_long": (1, 4, 4, 8, 8),
        },
        {
            "indices_hidden_states": torch.arange(2)[None] + 7,
            "indices_latents_history_short": torch.arange(1)[None] + 6,
            "indices_latents_history_mid": torch.arange(2)[None] + 4,
            "indices_latents_history_long": torch.arange(4)[None],
        },
    ),
    "AnyFlowTransformer3DModel": Case(
        "blocks",
        (1, 2, 4, 4, 4),
        WAN,
        TEXT_INPUT,
        arguments=lambda x, time, tensors: (
            tensors
            | {
                "hidden_states": x,
                "timestep": time[:, None].repeat(1, 2),
                "r_timestep": time[:, None].repeat(1, 2) / 2,
            }
        ),
    ),
    "ConsisIDTransformer3DModel": Case(
        "transformer_blocks",
        (1, 2, 4, 8, 8),
        COGVIDEO
        | {
            "is_train_face": True,
            "cross_attn_interval": 2,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 8,
            "LFE_vit_dim": 8,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 21,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 5,
        },
        TEXT_INPUT | {"id_cond": (1, 8)},
        {"id_vit_hidden": [tiny.noise(1, 3, 8, seed=i) for i in range(5)]},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        FLUX_BLOCKS,
        (1, 4, 2, 8, 8),
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        TEXT_INPUT
        | {
            "pooled_projections": (1, 8),
            "image_embeds": (1, 3, 16),
            "latents_clean": (1, 4, 2, 8, 8),
            "latents_history_2x": (1, 4, 2, 8, 8),
            "latents_history_4x": (1, 4, 4, 8, 8),
        },
        {
            "encoder_attention_mask": text_mask(),
            "indices_latents": torch.arange(2) + 7,
            "indices_latents_clean": torch.tensor([0, 6]),
            "indices_latents_history_2x": torch.arange(2) + 4,
            "indices_latents_history_4x": torch.arange(4),
        },
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        "transformer_blocks",
        LATENT,
        HEADS
        | CHANNELS
        | ROPE
        | {
            "num_layers": BLOCKS,
            "num_refiner_layers": 1,
            "text_embed_dim": tiny.TEXT_DIM,
            "text_embed_2_dim": 8,
            "image_embed_dim": 16,
        },
        TEXT_INPUT | {"encoder_hidden_states_2": (1, 4, 8), "image_embeds": (1, 3, 16)},
        {
            "encoder_attention_mask": text_mask(),
            "encoder_attention_mask_2": torch.tensor([[True, True, False, False]]),
        },
    ),
    "EasyAnimateTransformer3DModel": Case(
        "transformer_blocks",
        LATENT,
        HEADS
        | CHANNELS
        | {
            "attention_head_dim": 16,
            "patch_size": 2,
            "num_layers": BLOCKS,
            "mmdit_layers": 6,
            "time_embed_dim": 8,
            "text_embed_dim": tiny.TEXT_DIM,
        },
        TEXT_INPUT,
    ),
    "AllegroTransformer3DModel": Case(
        "transformer_blocks",
        LATENT,
        HEADS
        | CHANNELS
        | {
            "num_layers": BLOCKS,
            "cross_attention_dim": 24,
            "caption_channels": tiny.TEXT_DIM,
            "sample_height": 4,
            "sample_width": 4,
            "sample_frames": 2,
        },
        TEXT_INPUT,
        {
            "encoder_attention_mask": text_mask(),
            "image_rotary_emb": ([turns(2, 4)] * 3, PLACES.T[:, None]),
        },
    ),
    "LatteTransformer3DModel": Case(
        "transformer_blocks & temporal_transformer_blocks",
        (1, 4, 3, 4, 4),
        HEADS
        | CHANNELS
        | {
            "num_layers": BLOCKS // 2,
            "patch_size": 2,
            "sample_size": 4,
            "video_length": 3,
            "cross_attention_dim": 24,
            "caption_channels": tiny.TEXT_DIM,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
        },
        TEXT_INPUT,
    ),
    "CosmosTransformer3DModel": Case(
        "transformer_blocks",
        LATENT,
        HEADS
        | CHANNELS
        | {
            "num_layers": BLOCKS,
            "text_embed_dim": tiny.TEXT_DIM,
            "adaln_lora_dim": 8,
            "max_size": (4, 8, 8),
            "concat_padding_mask": False,  # it needs torchvision
            "controlnet_block_every_n": 3,
        },
        TEXT_INPUT,
        {"fps": 24},
    ),
    "SanaVideoTransformer3DModel": Case(
        "transformer_blocks",
        LATENT,
        HEADS
        | CHANNELS
        | {
            "num_layers": BLOCKS,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": tiny.TEXT_DIM,
            "sample_size": 4,
            "rope_max_seq_len": 32,
        },
        TEXT_INPUT,
        {"encoder_attention_mask": text_mask()},
    ),
    "Kandinsky5Transformer3DModel": Case(
        "visual_transformer_blocks",
        (1, 2, 4, 4, 4),
        KANDINSKY | {"num_text_blocks": 1},
        TEXT_INPUT | {"pooled_projections": (1, 8)},
        {
            "visual_rope_pos": [torch.arange(2)] * 3,
            "text_rope_pos": torch.arange(tiny.TEXT_TOKENS),
        },
    ),
    "MotifVideoTransformer3DModel": Case(
        "transformer_blocks + single_transformer_blocks[:-6]; single_transformer_blocks[-6:]",
        LATENT,
        HEADS
        | CHANNELS
        | ROPE
        | {
            "num_layers": 3,
            "num_single_layers": 12,
            "num_decoder_layers": 6,
            "text_embed_dim": tiny.TEXT_DIM,
        },
        TEXT_INPUT,
        {"encoder_attention_mask": text_mask()},
    ),
}
