"""Tiny models whose heads, lengths and masks are chosen by the caller, for tests across ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import models_image
import tiny
import torch

from dbcache.config.parallelism import ParallelismConfig
from dbcache.parallel.handle import Parallelized, prepare
from dbcache.parallel.plans import PLANS

WIDTH = 12
"""Of a head."""

FROM_ONE = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel",
    "ChromaTransformer2DModel",
    "QwenImageTransformer2DModel",
)
"""Classes whose time runs from 1 to 0 rather than from 1000."""


@dataclass(frozen=True)
class Subject:
    """One transformer class.

    Attributes:
        config: its arguments, but for the number of heads.
        latents: shape of `hidden_states` by kind of length, "even" (over 4) or "odd".
        masked: name of the argument that tells which text tokens count, if it has one.
        ids: axes of the positions of tokens that it takes, 0 for none.
        tensors: shapes of other inputs.
        more: what else it takes.
    """

    config: dict[str, Any]
    latents: dict[str, tuple[int, ...]]
    masked: str | None = None
    ids: int = 0
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


TEXT_LENGTHS = {"even": 8, "odd": 7}
TOKENS = {"even": (2, 16, 16), "odd": (2, 21, 16)}
FLUX_LIKE = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": WIDTH,
    "joint_attention_dim": tiny.TEXT_DIM,
    "axes_dims_rope": (4, 4, 4),
}
VIDEO = {"even": (2, 4, 2, 4, 8), "odd": (2, 4, 3, 6, 10)}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": WIDTH,
    "num_refiner_layers": 1,
    "text_embed_dim": tiny.TEXT_DIM,
}

COGVIDEO = {
    "attention_head_dim": WIDTH,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": tiny.TEXT_DIM,
    "num_layers": 4,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 8,
    "use_rotary_positional_embeddings": True,
}
COGVIDEO_LATENTS = {"even": (2, 2, 4, 8, 4), "odd": (2, 3, 4, 6, 10)}
CONSISID = {
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
    "LFE_ff_mult": 1,
    "LFE_num_scale": 5,
}
WAN = {
    "attention_head_dim": WIDTH,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": tiny.TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}

SUBJECTS = {
    "FluxTransformer2DModel": Subject(
        FLUX_LIKE | {"pooled_projection_dim": 12},
        TOKENS,
        ids=3,
        tensors={"pooled_projections": (2, 12)},
    ),
    "QwenImageTransformer2DModel": Subject(
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": WIDTH,
            "joint_attention_dim": tiny.TEXT_DIM,
            "axes_dims_rope": (4, 4, 4),
        },
        TOKENS,
        masked="encoder_hidden_states_mask",
    ),
    "WanTransformer3DModel": Subject(WAN, VIDEO),
    "ChronoEditTransformer3DModel": Subject(WAN, VIDEO),
    "Flux2Transformer2DModel": Subject(
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "attention_head_dim": 16,
            "joint_attention_dim": tiny.TEXT_DIM,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
            "guidance_embeds": False,
        },
        TOKENS,
        ids=4,
    ),
    "BriaTransformer2DModel": Subject(
        FLUX_LIKE | {"pooled_projection_dim": 12},
        TOKENS,
        ids=3,
        tensors={"pooled_projections": (2, 12)},
    ),
    "LongCatImageTransformer2DModel": Subject(
        FLUX_LIKE | {"pooled_projection_dim": 12}, TOKENS, ids=3
    ),
    "OvisImageTransformer2DModel": Subject(FLUX_LIKE | {"out_channels": 16}, TOKENS, ids=3),
    "PixArtTransformer2DModel": Subject(
        {
            "attention_head_dim": WIDTH,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "sample_size": 8,
            "caption_channels": tiny.TEXT_DIM,
            "use_additional_conditions": False,
        },
        {"even": (2, 4, 8, 8), "odd": (2, 4, 6, 10)},
        masked="encoder_attention_mask",
        more={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "HunyuanVideoTransformer3DModel": Subject(
        HUNYUAN
        | {"guidance_embeds": False, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4)},
        VIDEO,
        masked="encoder_attention_mask",
        tensors={"pooled_projections": (2, 8)},
    ),
    "CogVideoXTransformer3DModel": Subject(COGVIDEO, COGVIDEO_LATENTS),
    "ConsisIDTransformer3DModel": Subject(
        COGVIDEO | CONSISID,
        COGVIDEO_LATENTS,
        tensors={"id_cond": (2, 8)},
        more={"id_vit_hidden": [tiny.noise(2, 3, 8, seed=i) for i in range(5)]},
    ),
    "LTXVideoTransformer3DModel": Subject(
        {
            "attention_head_dim": WIDTH,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "caption_channels": tiny.TEXT_DIM,
        },
        {"even": (2, 16, 4), "odd": (2, 21, 4)},
        masked="encoder_attention_mask",
    ),
    "CogView3PlusTransformer2DModel": Subject(
        models_image.COGVIEW | {"num_layers": 4, "attention_head_dim": WIDTH, "sample_size": 16},
        {"even": (2, 4, 8, 8), "odd": (2, 4, 6, 10)},
        more=models_image.COGVIEW_INPUTS,
    ),
    "CogView4Transformer2DModel": Subject(
        models_image.COGVIEW
        | {"num_layers": 4, "attention_head_dim": WIDTH, "rope_axes_dim": (8, 8)},
        {"even": (2, 4, 8, 8), "odd": (2, 4, 6, 10)},
        more=models_image.COGVIEW_INPUTS,
    ),
    "ChromaTransformer2DModel": Subject(
        FLUX_LIKE
        | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        TOKENS,
        masked="attention_mask",
        ids=3,
    ),
    "HunyuanImageTransformer2DModel": Subject(
        HUNYUAN | {"guidance_embeds": False, "patch_size": (1, 1), "rope_axes_dim": (6, 6)},
        {"even": (2, 4, 4, 4), "odd": (2, 4, 3, 7)},
        masked="encoder_attention_mask",
    ),
}
"""Every class that has a row in `PLANS`."""


def build(name: str, heads: int) -> torch.nn.Module:
    """Return the tiny model of a class with so many heads."""
    config = dict(SUBJECTS[name].config) | {"num_attention_heads": heads}
    if name.startswith(("LTX", "PixArt")):
        config["cross_attention_dim"] = heads * WIDTH
    if name.startswith("ConsisID"):
        config["LFE_output_dim"] = heads * WIDTH * 2 // 3
    return tiny.fill(getattr(diffusers, name)(**config), seed=3)


def inputs(name: str, length: str, seed: int = 5, time: float = 0.7) -> dict[str, Any]:
    """Return what one step takes: two samples, and texts of different length where it masks."""
    subject = SUBJECTS[name]
    text = TEXT_LENGTHS[length]
    if name.startswith(("CogVideoX", "ConsisID")):
        text = 8
    latent = subject.latents[length]
    given: dict[str, Any] = {
        "hidden_states": tiny.noise(*latent, seed=seed),
        "encoder_hidden_states": tiny.noise(2, text, tiny.TEXT_DIM, seed=11),
        "timestep": torch.full((2,), time if name in FROM_ONE else 1000 * time),
        "return_dict": False,
    }
    for index, (key, shape) in enumerate(subject.tensors.items(), 21):
        given[key] = tiny.noise(*shape, seed=index)
    counts = torch.arange(text)[None] < torch.tensor([[text], [text - 3]])
    if subject.masked == "attention_mask":
        counts = torch.cat((counts, torch.ones(2, latent[1], dtype=torch.bool)), 1)
    if subject.masked:
        given[subject.masked] = counts
    if subject.ids:
        positions = torch.zeros(latent[1], subject.ids)
        positions[:, 1] = torch.arange(latent[1]) // 4
        positions[:, 2] = torch.arange(latent[1]) % 4
        given |= {"img_ids": positions, "txt_ids": torch.zeros(text, subject.ids)}
    if name.startswith("Flux2"):  # its positions have a batch
        given |= {key: given[key].expand(2, -1, -1) for key in ("img_ids", "txt_ids")}
    if name.startswith("Qwen"):
        given["img_shapes"] = [[(1, 4, 4) if length == "even" else (1, 3, 7)]] * 2
    if name.startswith("LTX"):
        given |= {"num_frames": 1, "height": 4 if length == "even" else 3}
        given["width"] = latent[1] // given["height"]
    if name.startswith(("CogVideoX", "ConsisID")):
        _, frames, _, height, width = latent
        tokens = frames * height * width // 4
        angles = tiny.noise(tokens, WIDTH // 2, seed=31).repeat_interleave(2, -1)
        given["image_rotary_emb"] = (angles.cos(), angles.sin())
    if "original_size" in subject.more:
        return given | {key: value.expand(2, -1) for key, value in subject.more.items()}
    return given | subject.more


def splits_layers(name: str) -> bool:
    """Whether the weights of a class can be split."""
    layers = PLANS[name].layers
    return layers is None or bool(layers)


@torch.no_grad()
def step(model: torch.nn.Module, given: dict[str, Any]) -> torch.Tensor:
    """Return the output of one step."""
    return model(**given)[0]


@contextmanager
def spread(model: torch.nn.Module, **options: Any) -> Iterator[Parallelized]:
    """Spread a model over the ranks, by the fields of `ParallelismConfig`."""
    (handle,) = prepare([model], ParallelismConfig(**options))
    handle.install()
    try:
        yield handle
    finally:
        handle.remove()
