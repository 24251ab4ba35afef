"""A transformer that was put in the place of another one: what `enable` would have made of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dbcache.adapters.blocks.block_list import BlockList
from dbcache.adapters.blocks.spec import TransformerSpec
from dbcache.adapters.models.lookup import find_specs, row_of
from dbcache.adapters.patching.attention import ModelAttention
from dbcache.adapters.patching.other_caches import refuse_other_caches
from dbcache.adapters.requests.setup import Setup
from dbcache.config.cache import alike


def setup_for(module: torch.nn.Module, old: Setup) -> Setup:
    """Return the setup of a transformer with the settings of another one; nothing is changed.

    Args:
        module: the transformer.
        old: of the one whose place it takes.

    Raises:
        AttributeError, TypeError, ValueError: why these settings cannot be its own.
    """
    sharding: Any = old.sharding
    if old.patches is not None:
        raise ValueError("its patch_functor was made for the other one")
    if sharding is not None and sharding.spreads:
        raise ValueError("the other one is spread over ranks, which must do this together")
    spec, modifiers = _spec_for(module, old.spec), old.modifiers
    if len(modifiers) != len(spec.stacks):
        if not alike(old.base, modifiers):
            raise ValueError("the params_modifiers were made for the stacks of the other one")
        modifiers = modifiers[:1] * len(spec.stacks)
    refuse_other_caches([module])
    backend = None if old.attention is None else old.attention.backend
    return Setup(
        spec,
        old.base,
        modifiers,
        graph_options=None if old.graphs is None else old.graphs.options,
        sharding=None if sharding is None else sharding.of(module),
        attention=ModelAttention.of(module, backend),
    )


def _spec_for(module: torch.nn.Module, old: TransformerSpec) -> TransformerSpec:
    """Return the blocks of a model: those that one of the same class has, else as in the table."""
    if type(module) is not type(old.transformer):
        if row_of(module) is None:
            raise ValueError(f"{type(module).__name__} is not in the table of models")
        return find_specs(module)[0]
    stacks = []
    for stack in old.stacks:
        lists = [BlockList(module, block_list.path) for block_list in stack.lists]
        kept = tuple(block_list for block_list in lists if block_list.blocks)
        stacks.append(dataclasses.replace(stack, lists=kept))
    kept_stacks = tuple(stack for stack in stacks if stack.lists)
    return dataclasses.replace(old, transformer=module, stacks=kept_stacks)
