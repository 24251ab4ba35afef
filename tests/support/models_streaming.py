"""Tiny models of the families that make a video piece by piece, with keys and values kept."""

import importlib
from unittest import mock

import tiny
import torch
from model_case import BLOCKS, Case, text_mask
from models_joint import LTX2
from models_video import LATENT, TEXT_INPUT, WAN, turns
from torch.nn.attention import flex_attention

# it is compiled else, for seconds, only to run eagerly on the CPU
flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True


def module(name: str):
    """Return a module of diffusers; it may lack it."""
    return importlib.import_module(f"diffusers.models.transformers.transformer_{name}")


def far_arguments(x, time, tensors):
    """Return what AnyFlow-FAR takes for the second chunk of a video; it writes into the flags."""
    return tensors | {
        "hidden_states": x,
        "timestep": time[:, None].repeat(1, 2),
        "r_timestep": time[:, None].repeat(1, 2) / 2,
        "chunk_partition": [2, 2],
        "kv_cache": [
            {
                "full_cache": tiny.noise(2, 1, 2, 16, 12, seed=i),
                "compressed_cache": torch.zeros(2, 1, 2, 0, 12),
            }
            for i in range(BLOCKS)
        ],
        "kv_cache_flag": {"is_cache_step": False, "num_cached_chunks": 1},
    }


def refiner_arguments(x, time, tensors):
    """Return what Sana-WM's refiner takes for a block of frames."""
    cache = module("sana_wm_refiner").SanaWMRefinerKVCache(BLOCKS)
    cache.sink_pe = tuple(t[None] for t in turns(4, 24))
    for i in range(BLOCKS):
        cache.get(i).store_sink(*tiny.noise(2, 1, 4, 24, seed=i))
        cache.get(i).store_history(*tiny.noise(2, 1, 2, 24, seed=20 + i))
    return tensors | {
        "hidden_states": x,
        "timestep": time[:, None].repeat(1, 16),
        "video_rotary_emb": tuple(t[None] for t in turns(16, 24)),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
    }


def animate_arguments(x, time, tensors):
    """Return what Wan-Animate 2 takes for a segment."""
    cache = module("wan_animate_2").WanAnimate2KVCache(BLOCKS)
    for i in range(BLOCKS):
        cache.get(i).store(*tiny.noise(2, 1, 8, 2, 12, seed=i))
    return {
        "hidden_states": [x[0]],
        "condition_latents": [tensors["condition_latents"][0]],
        "encoder_hidden_states": [tensors["encoder_hidden_states"][0]],
        "timestep": time,
        "kv_cache": cache,
        "kv_cache_mode": "cached",
    }


ANIMATE = {
    "text_len": 8,
    "in_dim": 8,
    "dim": 24,
    "ffn_dim": 48,
    "freq_dim": 32,
    "text_dim": tiny.TEXT_DIM,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": BLOCKS,
    "use_img_emb": False,
}


def animate() -> torch.nn.Module:
    """Return a Wan-Animate 2 transformer with its attention mask made, which else is compiled."""
    wan = module("wan_animate_2")
    model = tiny.fill(wan.WanAnimate2Transformer3DModel(**ANIMATE), seed=3)
    make = wan.create_block_mask
    with mock.patch.object(wan, "create_block_mask") as patched:
        patched.side_effect = lambda *args, _compile, **kwargs: make(*args, **kwargs)
        model.block_masks[2, 4] = model.create_mask(2, 4, torch.device("cpu"))
    return model


CAMERA = torch.cat([torch.eye(4).flatten(), torch.tensor([1.0, 1.0, 0.5, 0.5])]).repeat(1, 2, 1)
"""Per frame: where the camera is, as a matrix, and its focal lengths and centre."""

CASES = {
    "AnyFlowFARTransformer3DModel": Case(
        "blocks",
        (1, 2, 4, 4, 4),
        WAN,
        TEXT_INPUT,
        arguments=far_arguments,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Case(
        "transformer_blocks",
        (1, 16, 4),
        LTX2,
        TEXT_INPUT,
        {"encoder_attention_mask": text_mask()},
        arguments=refiner_arguments,
    ),
    "WanAnimate2Transformer3DModel": Case(
        "blocks",
        LATENT,
        tensors=TEXT_INPUT | {"condition_latents": LATENT},
        inputs={
            "seq_len": 8,
            "reference_grid_sizes": torch.tensor([[2, 2, 2]]),
            "origin_len": 5,
            "origin_area": [32, 32],
        },
        build=animate,
        arguments=animate_arguments,
    ),
    "SanaWMTransformer3DModel": Case(
        "blocks",
        (1, 4, 2, 2, 2),
        {
            "in_channels": 4,
            "num_layers": BLOCKS,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 3,
            "chunk_plucker_post_attn_blocks": 5,
            "caption_channels": tiny.TEXT_DIM,
            "mlp_ratio": 2.0,
        },
        TEXT_INPUT | {"chunk_plucker": (1, 3, 2, 2, 2)},
        {"encoder_attention_mask": text_mask(), "camera_conditions": CAMERA},
        arguments=lambda x, time, tensors: (
            tensors | {"hidden_states": x, "timestep": time.view(1, 1, 1).repeat(1, 1, 2)}
        ),
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        "visual_transformer_blocks",
        (1, 2, 8, 8, 5),
        {
            "in_visual_dim": 2,
            "out_visual_dim": 5,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 32,
            "num_visual_blocks": BLOCKS,
            "axes_dims": (4, 4, 4),
        },
    ),
}
