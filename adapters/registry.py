"""The table of models: one row per transformer class says which blocks it has.

A new family is one more row. The class is matched by name along the method resolution order, so
that nothing is imported and subclasses count; a pipeline is supported if one of its components is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dbcache.adapters.block_adapter import StackSpec, TransformerSpec, check_signatures, unwrap
from dbcache.adapters.patterns import ForwardPattern
from dbcache.adapters.stack import BlockList


@dataclass(frozen=True)
class StackRow:
    """Attribute names of the lists of one stack, in the order of the forward, and their pattern."""

    lists: tuple[str, ...]
    pattern: ForwardPattern


@dataclass(frozen=True)
class ModelRow:
    """One transformer class.

    Attributes:
        transformer: class name in diffusers.
        models: what users call the models that have it.
        stacks: its block stacks.
        separate_cfg: a loop that does not name its calls alternates between two guidance branches.
    """

    transformer: str
    models: str
    stacks: tuple[StackRow, ...]
    separate_cfg: bool = False


MODELS = (
    ModelRow(
        "FluxTransformer2DModel",
        "FLUX.1 (dev, schnell, Kontext, Fill)",
        (StackRow(("transformer_blocks", "single_transformer_blocks"), ForwardPattern.Pattern_1),),
    ),
    ModelRow(
        "QwenImageTransformer2DModel",
        "Qwen-Image",
        (StackRow(("transformer_blocks",), ForwardPattern.Pattern_1),),
        separate_cfg=True,
    ),
    ModelRow(
        "WanTransformer3DModel",
        "Wan 2.1, Wan 2.2",
        (StackRow(("blocks",), ForwardPattern.Pattern_2),),
        separate_cfg=True,
    ),
    ModelRow(
        "CogVideoXTransformer3DModel",
        "CogVideoX, CogVideoX 1.5",
        (StackRow(("transformer_blocks",), ForwardPattern.Pattern_0),),
    ),
    ModelRow(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideo",
        (StackRow(("transformer_blocks", "single_transformer_blocks"), ForwardPattern.Pattern_0),),
    ),
    ModelRow(
        "MochiTransformer3DModel",
        "Mochi",
        (StackRow(("transformer_blocks",), ForwardPattern.Pattern_0),),
    ),
    ModelRow(
        "LTXVideoTransformer3DModel",
        "LTX-Video",
        (StackRow(("transformer_blocks",), ForwardPattern.Pattern_2),),
    ),
    ModelRow(
        "CogView4Transformer2DModel",
        "CogView4",
        (StackRow(("transformer_blocks",), ForwardPattern.Pattern_0),),
        separate_cfg=True,
    ),
    ModelRow(
        "PixArtTransformer2DModel",
        "PixArt-alpha, PixArt-sigma",
        (StackRow(("transformer_blocks",), ForwardPattern.Pattern_3),),
    ),
    ModelRow(
        "CogView3PlusTransformer2DModel",
        "CogView3-Plus",
        (StackRow(("transformer_blocks",), ForwardPattern.Pattern_0),),
    ),
    ModelRow(
        "BriaTransformer2DModel",
        "Bria 3.2",
        (StackRow(("transformer_blocks", "single_transformer_blocks"), ForwardPattern.Pattern_1),),
    ),
    ModelRow(
        "OvisImageTransformer2DModel",
        "Ovis-Image",
        (StackRow(("transformer_blocks", "single_transformer_blocks"), ForwardPattern.Pattern_1),),
        separate_cfg=True,
    ),
    ModelRow(
        "LongCatImageTransformer2DModel",
        "LongCat-Image",
        (StackRow(("transformer_blocks", "single_transformer_blocks"), ForwardPattern.Pattern_1),),
        separate_cfg=True,
    ),
    ModelRow(
        "SanaTransformer2DModel",
        "Sana",
        (StackRow(("transformer_blocks",), ForwardPattern.Pattern_3),),
    ),
)

_ROWS = {row.transformer: row for row in MODELS}


def row_of(module: object) -> ModelRow | None:
    """Return the row of a transformer's class or of the nearest base that has one."""
    for cls in type(module).__mro__:
        if cls.__name__ in _ROWS:
            return _ROWS[cls.__name__]
    return None


def find_specs(target: Any) -> list[TransformerSpec]:
    """Return what to cache of a transformer or of a pipeline's transformers.

    Raises:
        ValueError: no row fits; the error lists those there are.
    """
    if isinstance(target, torch.nn.Module):
        candidates = [unwrap(target)]
    else:
        parts = getattr(target, "__dict__", {}).values()
        candidates = [unwrap(part) for part in parts if isinstance(part, torch.nn.Module)]
    specs = [_spec(module, row) for module in candidates if (row := row_of(module)) is not None]
    if not specs:
        known = "\n".join(f"  {row.transformer}: {row.models}" for row in MODELS)
        raise ValueError(
            f"dbcache.enable: the transformer must be a supported one, got "
            f"{type(target).__name__} with {[type(c).__name__ for c in candidates]}.\n"
            f"Supported:\n{known}\n"
            f"Any other model works through a BlockAdapter that names its lists of blocks:\n"
            f"  dbcache.enable(dbcache.BlockAdapter(pipe=pipe, transformer=pipe.transformer,\n"
            f"      blocks=pipe.transformer.transformer_blocks,\n"
            f"      forward_pattern=dbcache.ForwardPattern.Pattern_0))"
        )
    return specs


def _spec(module: torch.nn.Module, row: ModelRow) -> TransformerSpec:
    stacks = []
    for stack in row.stacks:
        lists = tuple(
            BlockList(module, name, name) for name in stack.lists if getattr(module, name)
        )
        for block_list in lists:
            check_signatures(block_list, stack.pattern)
        stacks.append(StackSpec(lists, stack.pattern))
    return TransformerSpec(module, tuple(stacks), row.separate_cfg)
