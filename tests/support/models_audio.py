"""Tiny models of the audio families."""

import tiny
import torch
from model_case import BLOCKS, HEADS, TEXT, Case, text_mask

TEXT_INPUT = {"encoder_hidden_states": TEXT}

CASES = {
    "StableAudioDiTModel": Case(
        "transformer_blocks",
        (1, 8, 16),
        HEADS
        | {
            "sample_size": 16,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": BLOCKS,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 12,
            "time_proj_dim": 8,
            "global_states_input_dim": 12,
            "cross_attention_input_dim": tiny.TEXT_DIM,
        },
        {"encoder_hidden_states": TEXT, "global_hidden_states": (1, 1, 12)},
        {"rotary_embedding": (torch.ones(17, 6), torch.zeros(17, 6))},
        start=1.0,
    ),
    "AceStepTransformer1DModel": Case(
        "layers",
        (1, 8, 3),
        {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "in_channels": 6,
            "audio_acoustic_hidden_dim": 3,
            "sliding_window": 2,
        },
        TEXT_INPUT | {"context_latents": (1, 8, 3)},
        start=1.0,
        arguments=lambda x, time, tensors: (
            tensors | {"hidden_states": x, "timestep": time, "timestep_r": time}
        ),
    ),
    "LongCatAudioDiTTransformer": Case(
        "blocks",
        (1, 8, 4),
        {
            "dit_dim": 24,
            "dit_depth": BLOCKS,
            "dit_heads": 2,
            "dit_text_dim": tiny.TEXT_DIM,
            "latent_dim": 4,
        },
        TEXT_INPUT | {"latent_cond": (1, 8, 4)},
        {"encoder_attention_mask": text_mask(), "attention_mask": torch.ones(1, 8).bool()},
        start=1.0,
    ),
    "StableAudio3DiTModel": Case(
        "transformer_blocks",
        (1, 4, 8),
        {
            "io_channels": 4,
            "embed_dim": 24,
            "depth": BLOCKS,
            "num_heads": 2,
            "cond_token_dim": tiny.TEXT_DIM,
            "global_cond_dim": 8,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2.0,
            "num_memory_tokens": 2,
        },
        TEXT_INPUT | {"global_hidden_states": (1, 8), "local_add_cond": (1, 5, 8)},
        start=1.0,
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        "transformer_blocks",
        (1, 4, tiny.TEXT_TOKENS),
        HEADS
        | {
            "in_channels": 4,
            "condition_dim": tiny.TEXT_DIM,
            "num_layers": BLOCKS,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 16,
        },
        TEXT_INPUT,
        start=1.0,
    ),
    "T5FilmDecoder": Case(
        "decoders",
        (1, 6, 4),
        {
            "input_dims": 4,
            "targets_length": 6,
            "d_model": 24,
            "num_layers": BLOCKS,
            "num_heads": 2,
            "d_kv": 12,
            "d_ff": 32,
        },
        {"text": (1, 5, 24)},
        start=1.0,
        arguments=lambda x, time, tensors: {
            "encodings_and_masks": [(tensors["text"], torch.ones(1, 5))],
            "decoder_input_tokens": x,
            "decoder_noise_time": time,
        },
    ),
}
