"""The network of ImageReward: BLIP's image and text encoders, and a head of linear layers.

Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image
Generation" (github.com/zai-org/ImageReward); BLIP is Li et al. 2022. The encoders are those of
transformers; parameters are read from the published file, whose names are those of BLIP's code.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the training set."""

HEAD_WIDTH = 64
"""Channels per attention head of the image encoder."""

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."

RENAMED = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.norm(\d)", r"encoder.layers.\1.layer_norm\2"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
    (r"norm", "post_layernorm"),
)
"""Beginnings of BLIP's names in the image encoder, and transformers' for them."""


def renamed(name: str) -> str:
    """Return transformers' name of a parameter of BLIP's image encoder."""
    for old, new in RENAMED:
        if re.match(old, name):
            return re.sub(f"^{old}", new, name)
    return name


class RewardNetwork(nn.Module):
    """Reward of images for prompts, in standard deviations above the mean of the training set.

    Args:
        state: the tensors of `ImageReward.pt`; sizes of the image encoder and of the head are
            read from them.
        text_config: the fields of `med_config.json`.

    Raises:
        KeyError: a tensor that tells a size is missing.
    """

    def __init__(self, state: dict[str, torch.Tensor], text_config: dict[str, Any]) -> None:
        super().__init__()
        patches = state[f"{VISION}patch_embed.proj.weight"]
        width, patch = patches.shape[0], patches.shape[-1]
        points = state[f"{VISION}pos_embed"].shape[1] - 1
        self.side = round(points**0.5) * patch
        depth = len({key.split(".")[3] for key in state if key.startswith(f"{VISION}blocks.")})
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=state[f"{VISION}blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=depth,
            num_attention_heads=width // HEAD_WIDTH,
            image_size=self.side,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        kept = {key: value for key, value in text_config.items() if hasattr(BlipTextConfig(), key)}
        text = BlipTextConfig(**kept | {"encoder_hidden_size": width, "is_decoder": True})
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        weights = [key for key in state if re.fullmatch(rf"{HEAD}\d+\.weight", key)]
        weights.sort(key=lambda key: int(key.split(".")[2]))
        sizes = [state[key].shape for key in weights]
        # dropout lies between them in training, and nothing else
        self.head = nn.Sequential(*(nn.Linear(into, out) for out, into in sizes))
        self.names = {key.removesuffix(".weight"): f"head.{i}" for i, key in enumerate(weights)}

    def own_names(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of the published file by this module's names."""
        found = {}
        for key, x in state.items():
            if key.startswith(VISION):
                found[f"vision.{renamed(key.removeprefix(VISION))}"] = x
            elif key.startswith(TEXT):
                found[f"text.{key.removeprefix(TEXT)}"] = x
            elif key.startswith(HEAD):
                layer, _, kind = key.rpartition(".")
                found[f"{self.names[layer]}.{kind}"] = x
        return found

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return rewards (B,) of images (B, 3, side, side) and tokens (B, L) with their mask."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        features = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], device=image.device),
        ).last_hidden_state[:, 0]
        return (self.head(features)[:, 0] - MEAN) / STD
