"""Tiny models of the families that make video and audio at once."""

import tiny
import torch
from model_case import BLOCKS, HEADS, TEXT, Case, text_mask
from models_video import KANDINSKY, LATENT, PLACES, TEXT_INPUT

LTX2 = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 24,
    "audio_in_channels": 3,
    "audio_out_channels": 3,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": BLOCKS,
    "caption_channels": tiny.TEXT_DIM,
}

CASES = {
    "LTX2VideoTransformer3DModel": Case(
        "transformer_blocks",
        (1, 16, 4),
        LTX2,
        TEXT_INPUT | {"audio_encoder_hidden_states": TEXT, "audio_hidden_states": (1, 5, 3)},
        {
            "encoder_attention_mask": text_mask(),
            "audio_encoder_attention_mask": text_mask(),
            "num_frames": 1,
            "height": 4,
            "width": 4,
            "audio_num_frames": 5,
        },
        streams={"transformer_blocks": ("hidden_states", "audio_hidden_states")},
    ),
    "Cosmos3OmniTransformer": Case(
        "layers",
        LATENT,
        {
            "hidden_size": 24,
            "head_dim": 12,
            "intermediate_size": 32,
            "latent_channel": 4,
            "patch_latent_dim": 16,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_axes_dim": (2, 2, 2),
            "sound_dim": 3,
            "sound_gen": True,
            "vocab_size": 16,
        },
        {"sound": (3, 3)},
        {
            "input_ids": torch.arange(6),
            "text_indexes": torch.arange(6),
            "position_ids": torch.arange(6 + 8 + 3),
            "und_len": 6,
            "sequence_length": 6 + 8 + 3,
            "vision_token_shapes": [(2, 2, 2)],
            "vision_sequence_indexes": torch.arange(6, 14),
            "vision_mse_loss_indexes": torch.arange(6, 14),
            "vision_noisy_frame_indexes": [torch.arange(2)],
            "sound_token_shapes": [(3, 1, 1)],
            "sound_sequence_indexes": torch.arange(14, 17),
            "sound_mse_loss_indexes": torch.arange(14, 17),
            "sound_noisy_frame_indexes": [torch.arange(3)],
        },
        arguments=lambda x, time, tensors: {
            "vision_tokens": [x],
            "vision_timesteps": time.repeat(8),
            "sound_tokens": [tensors["sound"]],
            "sound_timesteps": time.repeat(3),
        },
        streams={"layers": ("gen_seq", "und_seq")},
    ),
    "Kandinsky6Transformer3DModel": Case(
        "visual_transformer_blocks",
        (1, 2, 4, 4, 4),
        KANDINSKY
        | {
            "num_text_blocks": 1,
            "visual_cond": False,
            "in_audio_dim": 3,
            "out_audio_dim": 3,
            "model_dim_a": 16,
            "axes_dims_a": (4, 2, 2),
        },
        TEXT_INPUT | {"pooled_projections": (1, 8), "audio_hidden_states": (1, 5, 3)},
        streams={"visual_transformer_blocks": ("vis", "aud")},
    ),
    "MiniMaxH3Transformer3DModel": Case(
        "transformer_blocks",
        (1, 8, 16),
        HEADS
        | {
            "hidden_size": 24,
            "num_layers": BLOCKS,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 3,
            "text_dim": tiny.TEXT_DIM,
            "freq_dim": 32,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,
        },
        TEXT_INPUT | {"audio_hidden_states": (1, 3, 3)},
        {
            "timestep_indices": torch.zeros(17, dtype=torch.long),
            "token_tags": torch.tensor([0] * 6 + [1] * 8 + [2] * 3),
            "position_ids": torch.cat([torch.zeros(6, 3), PLACES + 1, torch.ones(3, 3)]),
            "text_indices": torch.arange(6),
            "video_indices": torch.arange(6, 14),
            "audio_indices": torch.arange(14, 17),
        },
        start=1.0,
    ),
}
