"""Tiny models of what a class of the table is beside its usual form: versions, image to video."""

from dataclasses import replace

import models_joint
import models_video
import tiny
import torch
from model_case import Case
from models_video import LATENT, TEXT_INPUT, WAN, turns


def variant(name: str, config: dict, **changes) -> Case:
    """Return the case of a class with changes in its config and its inputs."""
    case = (models_video.CASES | models_joint.CASES)[name]
    for kind in ("tensors", "inputs"):
        changes[kind] = getattr(case, kind) | changes.get(kind, {})
    return replace(case, config=case.config | config, **changes)


CASES = {
    "WanTransformer3DModel, image to video": Case(
        "blocks",
        LATENT,
        WAN | {"image_dim": 16, "added_kv_proj_dim": 24},
        TEXT_INPUT | {"encoder_hidden_states_image": (1, 3, 16)},
    ),
    "WanTransformer3DModel, 2.2 with a time per token": Case(
        "blocks",
        LATENT,
        WAN,
        TEXT_INPUT,
        arguments=lambda x, time, tensors: (
            tensors
            | {
                "hidden_states": x,
                "timestep": time[:, None] * torch.tensor([[0.0] * 4 + [1.0] * 4]),
            }
        ),
    ),
    "CogVideoXTransformer3DModel, 1.5": variant(
        "CogVideoXTransformer3DModel",
        {
            "patch_size_t": 2,
            "patch_bias": False,
            "use_rotary_positional_embeddings": True,
            "ofs_embed_dim": 8,
        },
        inputs={"ofs": torch.tensor([2.0]), "image_rotary_emb": turns(16, 16)},
    ),
    "HunyuanVideoTransformer3DModel, token replace": variant(
        "HunyuanVideoTransformer3DModel", {"image_condition_type": "token_replace"}
    ),
    "HunyuanVideo15Transformer3DModel, without an image": variant(
        "HunyuanVideo15Transformer3DModel",
        {},
        arguments=lambda x, time, tensors: (
            tensors
            | {
                "hidden_states": x,
                "timestep": time,
                "image_embeds": torch.zeros_like(tensors["image_embeds"]),
            }
        ),
    ),
    "CosmosTransformer3DModel, 2.5 with an image": variant(
        "CosmosTransformer3DModel",
        {
            "in_channels": 5,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": tiny.TEXT_DIM,
            "encoder_hidden_states_channels": tiny.TEXT_DIM,
            "img_context_dim_in": 16,
            "img_context_num_tokens": 3,
            "img_context_dim_out": tiny.TEXT_DIM,
        },
        tensors={"image": (1, 3, 16), "condition_mask": (1, 1, 2, 4, 4)},
        arguments=lambda x, time, tensors: {
            "hidden_states": x,
            "condition_mask": tensors["condition_mask"],
            "encoder_hidden_states": (tensors["encoder_hidden_states"], tensors["image"]),
            "timestep": time.view(1, 1, 1, 1, 1).repeat(1, 1, 2, 1, 1),
        },
    ),
    "LTX2VideoTransformer3DModel, 2.3": variant(
        "LTX2VideoTransformer3DModel",
        {
            "gated_attn": True,
            "audio_gated_attn": True,
            "cross_attn_mod": True,
            "audio_cross_attn_mod": True,
            "perturbed_attn": True,
        },
        inputs={"use_cross_timestep": True, "spatio_temporal_guidance_blocks": [4]},
        arguments=lambda x, time, tensors: (
            tensors | {"hidden_states": x, "timestep": time, "sigma": time}
        ),
    ),
    "SkyReelsV2Transformer3DModel, diffusion forcing": variant(
        "SkyReelsV2Transformer3DModel",
        {"inject_sample_info": True, "num_frame_per_block": 2},
        inputs={"enable_diffusion_forcing": True, "fps": [1]},
        arguments=lambda x, time, tensors: (
            tensors | {"hidden_states": x, "timestep": time[:, None] * torch.tensor([[0.5, 1.0]])}
        ),
    ),
    "MotifVideoTransformer3DModel, without a decoder": variant(
        "MotifVideoTransformer3DModel",
        {"num_decoder_layers": 0},
        blocks="transformer_blocks + single_transformer_blocks",
    ),
    "LatteTransformer3DModel, one image": variant(
        "LatteTransformer3DModel",
        {},
        latent=(1, 4, 1, 4, 4),
        inputs={"enable_temporal_attentions": False},
    ),
    "EasyAnimateTransformer3DModel, two texts and a control": variant(
        "EasyAnimateTransformer3DModel",
        {"in_channels": 8, "text_embed_dim_t5": 16},
        tensors={"encoder_hidden_states_t5": (1, 4, 16), "control_latents": LATENT},
    ),
    "AnyFlowFARTransformer3DModel, without kept keys": Case(
        "blocks",
        (1, 2, 4, 4, 4),
        WAN,
        TEXT_INPUT,
        {"chunk_partition": [1, 1]},
        arguments=lambda x, time, tensors: (
            tensors
            | {
                "hidden_states": x,
                "timestep": time[:, None].repeat(1, 2),
                "r_timestep": time[:, None].repeat(1, 2) / 2,
            }
        ),
    ),
}
"""By the name of the class and what is special."""
