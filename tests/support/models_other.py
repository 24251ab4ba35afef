"""Tiny models of what is neither of the image, nor of the video, nor of the audio families."""

import tiny
from model_case import BLOCKS, HEADS, TEXT, Case, text_mask

CASES = {
    "UVit2DModel": Case(
        "transformer_layers",
        (1, 28, 4, 4),
        {
            "hidden_size": 24,
            "cond_embed_dim": 12,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": tiny.TEXT_DIM,
            "vocab_size": 32,
            "codebook_size": 28,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "sample_size": 4,
        },
        {"encoder_hidden_states": TEXT, "pooled_text_emb": (1, 12), "micro_conds": (1, 5)},
        arguments=lambda x, t, tensors: {**tensors, "input_ids": (10 * x[:, 0]).long() % 32},
    ),
    "PriorTransformer": Case(
        "transformer_blocks",
        (1, 8),
        HEADS
        | {
            "num_layers": BLOCKS,
            "embedding_dim": 8,
            "num_embeddings": tiny.TEXT_TOKENS,
            "additional_embeddings": 4,
        },
        {"proj_embedding": (1, 8), "encoder_hidden_states": (1, tiny.TEXT_TOKENS, 8)},
        {"attention_mask": text_mask()},
    ),
    "Transformer2DModel": Case(
        "transformer_blocks",
        (1, 4, 8, 8),
        HEADS
        | {
            "in_channels": 4,
            "num_layers": BLOCKS,
            "norm_num_groups": 2,
            "cross_attention_dim": tiny.TEXT_DIM,
        },
        {"encoder_hidden_states": TEXT},
        arguments=lambda x, t, tensors: {"hidden_states": x, **tensors},
    ),
}
