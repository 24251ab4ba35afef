"""A transformer that was put in the place of another one: what `enable` would have made of it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dbcache.adapters.blocks.block_list import BlockList
from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.blocks.spec import TransformerSpec
from dbcache.adapters.models.lookup import find_specs, refuse_wrapped, row_of
from dbcache.adapters.patching.attention import ModelAttention
from dbcache.adapters.patching.other_caches import refuse_other_caches
from dbcache.adapters.requests.request import Request
from dbcache.adapters.requests.setup import Setup
from dbcache.config.cache import alike


class Exchanged:
    """The transformers that a pipeline has in place of those that it was enabled with.

    Args:
        pipe: the pipeline.
        modules: the transformers that it was enabled with.

    Attributes:
        names: attributes of the pipeline that hold them; None where they are not to be found.
        follow: returns the handle of the pipeline to go on with.
        followed: places of those that are cached; it is said with the next call.
        refused: why others are not, by their places.
    """

    def __init__(self, pipe: Any, modules: Sequence[torch.nn.Module]) -> None:
        self.pipe, self.modules = pipe, modules
        names = {id(unwrap(part)): name for name, part in list(vars(pipe).items())}
        self.names = [names.get(id(module)) for module in modules]
        self.follow: Callable[[Any], Any] = lambda pipeline: pipeline
        self.lock = threading.RLock()
        self.followed: set[int] = set()
        self.refused: dict[int, str] = {}

    def found(self) -> dict[int, Any]:
        """Return what the pipeline has in place of its transformers, by their place here.

        What wraps one, or another of them, is not in its place; nor is one that is gone.
        """
        parts = [None if name is None else getattr(self.pipe, name, None) for name in self.names]
        return {
            i: part
            for i, part in enumerate(parts)
            if isinstance(part, torch.nn.Module)
            and not any(module is one for module in part.modules() for one in self.modules)
        }

    def say(self, requests: Iterable[Request]) -> None:
        """Say which transformers are others than those that the pipeline was enabled with."""
        others = self.found()
        for i, request in enumerate(requests):
            if i in self.followed:
                request.notices.add(request, "followed")
            elif i in others and i in self.refused:
                request.notices.add(request, "exchanged", why=self.refused[i])
        self.followed = set()


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
        graph_options=old.graph_options,
        sharding=None if sharding is None else sharding.of(module),
        attention=ModelAttention.of(module, backend),
    )


def _spec_for(module: torch.nn.Module, old: TransformerSpec) -> TransformerSpec:
    """Return the blocks of a model: those that one of the same class has, else as in the table."""
    if type(module) is not type(old.transformer):
        refuse_wrapped([module])
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
