"""Text encoders of transformers: their weights over ranks, by the splitter of `tensor.py`.

What is split is found by the class of an attention module and by the names of the layers of a feed
forward. Embeddings, norms and the towers of images stay whole.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dbcache.parallel.mesh import Axis
from dbcache.parallel.plans import Style
from dbcache.parallel.tensor import SplitLayers

_T5 = ("q", "k", "v", "o")
_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")

ATTENTIONS = {
    "T5Attention": _T5,
    "UMT5Attention": _T5,
    "CLIPAttention": _CLIP,
    "Gemma2Attention": _LLAMA,
    "Gemma3Attention": _LLAMA,
    "GemmaAttention": _LLAMA,
    "GlmAttention": _LLAMA,
    "LlamaAttention": _LLAMA,
    "MistralAttention": _LLAMA,
    "Qwen2_5_VLAttention": _LLAMA,
    "Qwen2Attention": _LLAMA,
    "Qwen2VLAttention": _LLAMA,
    "Qwen3Attention": _LLAMA,
    "Qwen3VLTextAttention": _LLAMA,
    "SmolLM3Attention": _LLAMA,
}
"""Attention classes that work on any number of whole heads, and their projections."""

FEED_FORWARDS: tuple[dict[str, Style], ...] = (
    {"wi_0": "colwise", "wi_1": "colwise", "wo": "rowwise"},
    {"wi": "colwise", "wo": "rowwise"},
    {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"},
    {"gate_up_proj": "halves", "down_proj": "rowwise"},
    {"fc1": "colwise", "fc2": "rowwise"},
)


class SplitEncoder:
    """A text encoder whose weights are spread over ranks.

    Args:
        encoder: a model of transformers.
        size: number of ranks.
        device: type of device that the ranks' transformers are on.

    Raises:
        ValueError: no attention that can be split, heads that the ranks do not divide, weights that
            are quantised, offloaded, or spread already.
    """

    def __init__(self, encoder: torch.nn.Module, size: int, device: str) -> None:
        self.who = type(encoder).__name__
        plan: dict[str, Style] = {}
        towers: set[str] = set()
        for name, module in encoder.named_modules():
            projections = ATTENTIONS.get(type(module).__name__)
            if projections is not None:
                self._check_heads(module, projections, size)
                styles = _attention(module, projections)
                towers.add(_tower(name))
            else:
                styles = _feed_forward(module) if _tower(name) in towers else {}
            plan |= {f"{name}.{layer}": style for layer, style in styles.items()}
        if not plan:
            raise ValueError(
                f"{self.who}: its weights cannot be spread; leave it out of "
                f"extra_parallel_modules; known are text encoders made of "
                f"{', '.join(sorted(ATTENTIONS))}"
            )
        self._check_place(encoder, device)
        self.layers = SplitLayers(encoder, plan, size, self.who, "the number of ranks")

    def _check_heads(self, attention: Any, projections: tuple[str, ...], size: int) -> None:
        width = getattr(attention, "head_dim", None) or attention.key_value_proj_dim
        for name in projections[:2]:
            features = getattr(getattr(attention, name), "out_features", 0)
            if features // width % size:
                raise ValueError(
                    f"{self.who}: the {size} ranks must divide the {features // width} heads of "
                    f"{name}; leave it out of extra_parallel_modules, or take another number of "
                    f"ranks"
                )

    def _check_place(self, encoder: torch.nn.Module, device: str) -> None:
        if any(isinstance(parameter, DTensor) for parameter in encoder.parameters()):
            raise ValueError(f"{self.who}: must not be spread already; disable its pipeline first")
        own = {parameter.device.type for parameter in encoder.parameters()}
        if own != {device} or any(hasattr(part, "_hf_hook") for part in encoder.modules()):
            raise ValueError(
                f"{self.who}: must be on the {device} of the transformer and stay there, got "
                f"{', '.join(sorted(own))}; move it there before enable, without offload"
            )

    def install(self, axis: Axis) -> None:
        """Keep this rank's part of the weights."""
        self.layers.install(axis)

    def remove(self) -> None:
        """Gather the weights again; all ranks must call this alike."""
        self.layers.remove()


def _tower(name: str) -> str:
    """Return the list of layers that a module is in."""
    return re.split(r"\.\d+\.", name)[0]


def _attention(attention: Any, projections: tuple[str, ...]) -> dict[str, Style]:
    *columns, rows = projections
    styles: dict[str, Style] = {**dict.fromkeys(columns, "colwise"), rows: "rowwise"}
    if getattr(attention, "has_relative_attention_bias", False):
        styles["relative_attention_bias"] = "outputs"
    return styles


def _feed_forward(module: torch.nn.Module) -> dict[str, Style]:
    weights = {name: getattr(part, "weight", None) for name, part in module.named_children()}
    layers = {name for name, weight in weights.items() if weight is not None and weight.ndim == 2}
    return next((styles for styles in FEED_FORWARDS if layers == set(styles)), {})
