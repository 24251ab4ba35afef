"""What is split over ranks in which transformer: one row per class, all of it data.

Where diffusers has a plan of its own for a class (`_cp_plan`, `_tp_plan`), it is used and the row
only adds what it lacks; the others are here. The fields that users care about are in the table of
docs/parallel.md, which a test compares with this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from dbcache.parallel.sequence import ENCODER, HIDDEN, JointPad, JointSplit


@dataclass(frozen=True)
class Packed:
    """Tensor parallel style of a row-wise layer whose input is several outputs, side by side.

    Attributes:
        parts: names of the layers beside it that made them, each split column-wise.
    """

    parts: tuple[str, ...]


class PackedByDiffusers(Protocol):
    """diffusers' `PackedColwiseParallel` or `PackedRowwiseParallel`, told apart by their names.

    Not imported: what has no `_tp_plan` yet does not have them.
    """

    blocks: list[int] | None


Style = Literal["colwise", "rowwise", "halves", "norm", "outputs"] | Packed | PackedByDiffusers
"""How a layer is split: "halves" is column-wise for two layers in one, "norm" an RMS norm over all
heads; of "outputs" the weights stay, and what it returns is as wide as all heads."""


@dataclass(frozen=True)
class PlanRow:
    """How one transformer class is spread over ranks.

    Attributes:
        attention: patterns of the attention modules that see the whole sequence, with the streams
            that make it up. Empty: the class cannot be split along the sequence.
        sequence: what is split and gathered; None: diffusers' `_cp_plan`.
        layers: patterns of layers and their styles; None: diffusers' `_tp_plan`, empty: none.
        filled: streams of which each rank needs a token.
        rejected: values of the model's config under which it mixes tokens by their position.
        projections: the processor that `experimental_ulysses_async` puts in; see
            `async_projections`.
        residuals: inputs of the model that are added to the latents' tokens (a ControlNet's).
    """

    attention: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sequence: Mapping[str, Any] | None = None
    layers: Mapping[str, Style] | None = field(default_factory=dict)
    filled: tuple[str, ...] = (HIDDEN,)
    rejected: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    projections: str | None = None
    residuals: tuple[str, ...] = ()


JOINT = (ENCODER, HIDDEN)
LATENT = (HIDDEN,)
TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
IDS = ContextParallelInput(split_dim=0, expected_dims=2)
ROPE = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
GATHER = ContextParallelOutput(gather_dim=1, expected_dims=3)

_BOTH_LISTS = {"transformer_blocks.*.attn": JOINT, "single_transformer_blocks.*.attn": JOINT}
_CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")
_ONE_LIST = {"transformer_blocks.*.attn1": JOINT}


def _hunyuan_sequence(list_names: tuple[str, ...]) -> dict[str, Any]:
    """Both streams enter the first block whole; each block gets a mask of [latent, text]."""
    mask = {"attention_mask": JointSplit(3, (HIDDEN, ENCODER))}
    return {
        "rope": {0: ROPE, 1: ROPE},
        "transformer_blocks.0": {HIDDEN: TOKENS, ENCODER: TOKENS},
        **{f"{name}.*": mask for name in list_names},
        "proj_out": GATHER,
    }


_COGVIDEO_SEQUENCE = {
    "": {"image_rotary_emb": (IDS, IDS)},
    "transformer_blocks.0": {HIDDEN: TOKENS, ENCODER: TOKENS},
    "norm_final": {0: JointPad(1, JOINT)},
    "proj_out": GATHER,
}


def _layers(*groups: Mapping[str, Style]) -> dict[str, Style]:
    return {pattern: style for group in groups for pattern, style in group.items()}


def _projections(attention: str, *, added: bool = False, norm: bool = False) -> dict[str, Style]:
    """Q, K and V column-wise, so that a rank has whole heads; the output row-wise."""
    styles: dict[str, Style] = {f"{attention}.to_{name}": "colwise" for name in "qkv"}
    styles[f"{attention}.to_out.0"] = "rowwise"
    if added:
        styles |= {f"{attention}.add_{name}_proj": "colwise" for name in "qkv"}
        styles[f"{attention}.to_add_out"] = "rowwise"
    if norm:
        styles |= {f"{attention}.norm_{name}": "norm" for name in ("q", "k", "added_k")}
    return styles


def _feed_forward(path: str) -> dict[str, Style]:
    return {f"{path}.net.0.proj": "colwise", f"{path}.net.2": "rowwise"}


_DOUBLE = _layers(
    _projections("transformer_blocks.*.attn", added=True),
    _feed_forward("transformer_blocks.*.ff"),
    _feed_forward("transformer_blocks.*.ff_context"),
)
_SINGLE: dict[str, Style] = {
    **{f"single_transformer_blocks.*.attn.to_{name}": "colwise" for name in "qkv"},
    "single_transformer_blocks.*.proj_mlp": "colwise",
    "single_transformer_blocks.*.proj_out": Packed(("attn.to_q", "proj_mlp")),
}
_JOINT_BLOCKS = _layers(
    _projections("transformer_blocks.*.attn1"), _feed_forward("transformer_blocks.*.ff")
)

_FLUX_SEQUENCE: dict[str, Any] = {
    "": {HIDDEN: TOKENS, ENCODER: TOKENS, "img_ids": IDS, "txt_ids": IDS},
    "proj_out": GATHER,
}
# diffusers' own plan of Wan splits the text up to 0.36, which a rank needs whole to attend to
_WAN_SEQUENCE = {
    "": {"timestep": ContextParallelInput(split_dim=1, expected_dims=2)},
    "rope": {
        index: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True)
        for index in (0, 1)
    },
    "blocks.0": {HIDDEN: TOKENS},
    "proj_out": GATHER,
}
_WAN_LAYERS = _layers(
    _projections("blocks.*.attn1", norm=True),
    _projections("blocks.*.attn2", norm=True),
    {"blocks.*.attn2.add_k_proj": "colwise", "blocks.*.attn2.add_v_proj": "colwise"},
    _feed_forward("blocks.*.ffn"),
)

PLANS = {
    "FluxTransformer2DModel": PlanRow(
        _BOTH_LISTS,
        layers=_layers(_DOUBLE, _SINGLE),
        projections="flux",
        residuals=_CONTROLNET,
    ),
    "ChromaTransformer2DModel": PlanRow(
        _BOTH_LISTS,
        {
            "": {**_FLUX_SEQUENCE[""], "attention_mask": JointSplit(1, JOINT)},
            "proj_out": GATHER,
        },
        _layers(_DOUBLE, _SINGLE),
        projections="flux",
        residuals=_CONTROLNET,
    ),
    "QwenImageTransformer2DModel": PlanRow(
        {"transformer_blocks.*.attn": JOINT},
        layers=_layers(
            _projections("transformer_blocks.*.attn", added=True),
            _feed_forward("transformer_blocks.*.img_mlp"),
            _feed_forward("transformer_blocks.*.txt_mlp"),
        ),
        projections="qwen",
        residuals=_CONTROLNET[:1],
    ),
    "WanTransformer3DModel": PlanRow({"blocks.*.attn1": LATENT}, _WAN_SEQUENCE, _WAN_LAYERS),
    "ChronoEditTransformer3DModel": PlanRow({"blocks.*.attn1": LATENT}, _WAN_SEQUENCE, _WAN_LAYERS),
    "Flux2Transformer2DModel": PlanRow(_BOTH_LISTS, layers=None),
    "BriaTransformer2DModel": PlanRow(_BOTH_LISTS, _FLUX_SEQUENCE),
    "LongCatImageTransformer2DModel": PlanRow(_BOTH_LISTS, _FLUX_SEQUENCE),
    "OvisImageTransformer2DModel": PlanRow(_BOTH_LISTS, _FLUX_SEQUENCE),
    "PixArtTransformer2DModel": PlanRow(
        {"transformer_blocks.*.attn1": LATENT},
        {"transformer_blocks.0": {HIDDEN: TOKENS}, "proj_out": GATHER},
        _layers(_JOINT_BLOCKS, _projections("transformer_blocks.*.attn2")),
    ),
    "LTXVideoTransformer3DModel": PlanRow(
        # diffusers' own plan splits the text, too, which a rank needs whole to attend to
        {"transformer_blocks.*.attn1": LATENT},
        {
            "": {
                HIDDEN: TOKENS,
                "timestep": ContextParallelInput(split_dim=1, expected_dims=2),
            },
            "rope": {
                index: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
                for index in (0, 1)
            },
            "proj_out": GATHER,
        },
        _layers(
            {"rope": "outputs"},
            _projections("transformer_blocks.*.attn1", norm=True),
            _projections("transformer_blocks.*.attn2", norm=True),
            _feed_forward("transformer_blocks.*.ff"),
        ),
    ),
    "HunyuanVideoTransformer3DModel": PlanRow(
        _BOTH_LISTS,
        _hunyuan_sequence(("transformer_blocks", "single_transformer_blocks")),
        _layers(_DOUBLE, _SINGLE),
        filled=JOINT,
        rejected={"image_condition_type": ("token_replace",)},
    ),
    "HunyuanImageTransformer2DModel": PlanRow(
        _BOTH_LISTS,
        _hunyuan_sequence(("transformer_blocks", "single_transformer_blocks")),
        _layers(_DOUBLE, _SINGLE),
        filled=JOINT,
    ),
    "CogVideoXTransformer3DModel": PlanRow(_ONE_LIST, _COGVIDEO_SEQUENCE, _JOINT_BLOCKS),
    "ConsisIDTransformer3DModel": PlanRow(_ONE_LIST, _COGVIDEO_SEQUENCE, _JOINT_BLOCKS),
    "CogView3PlusTransformer2DModel": PlanRow(
        _ONE_LIST,
        {"transformer_blocks.0": {HIDDEN: TOKENS, ENCODER: TOKENS}, "proj_out": GATHER},
        _JOINT_BLOCKS,
    ),
    "CogView4Transformer2DModel": PlanRow(
        _ONE_LIST,
        {
            "rope": {0: ROPE, 1: ROPE},
            "transformer_blocks.0": {HIDDEN: TOKENS, ENCODER: TOKENS},
            "proj_out": GATHER,
        },
        _JOINT_BLOCKS,
    ),
}
"""By name of the transformer class."""
