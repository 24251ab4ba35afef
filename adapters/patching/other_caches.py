"""Finds caches of other libraries on a model: what they skip, dbcache cannot measure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

REGISTRY = "_diffusers_hook"
"""Attribute in which diffusers keeps the hooks of a module."""

HOOKS = {
    "diffusers.hooks.first_block_cache": "FirstBlockCache",
    "diffusers.hooks.faster_cache": "FasterCache",
    "diffusers.hooks.mag_cache": "MagCache",
    "diffusers.hooks.pyramid_attention_broadcast": "Pyramid Attention Broadcast",
    "diffusers.hooks.sea_cache": "SeaCache",
    "diffusers.hooks.taylorseer_cache": "TaylorSeerCache",
    "diffusers.hooks.layer_skip": "layer skipping",
    "diffusers.hooks.smoothed_energy_guidance_utils": "SmoothedEnergyGuidance",
}
"""By the module of a hook's class, what it belongs to. diffusers' text KV cache is exact."""

ATTRIBUTES = {
    "_is_cached": ("cache-dit", "cache_dit.disable_cache(pipe)"),
    "previous_modulated_input": ("TeaCache", "load the model anew, or restore its forward"),
}
"""By an attribute of a model, or of its class, that is not None or False: whose it is, the cure."""

Found = tuple[str, str]
"""Name of a cache, and how to remove it."""


def other_cache_of(
    model: torch.nn.Module, lists: Sequence[Sequence[torch.nn.Module]] | None = None
) -> Found | None:
    """Return another cache that is on a model; None where there is none.

    Args:
        model: the transformer.
        lists: its blocks; where given only these are searched, and what the first ones hold.
    """
    for name, found in ATTRIBUTES.items():
        if getattr(model, name, None) not in (None, False):
            return found
    for module in model.modules() if lists is None else _outer(model, lists):
        for name, hook in _hooks(module):
            source = type(hook).__module__
            if source in HOOKS:
                called = f"diffusers' {HOOKS[source]}"
                if getattr(model, "_cache_config", None) is not None:
                    return called, "transformer.disable_cache()"
                return called, (
                    f"diffusers.hooks.HookRegistry.check_if_exists_or_initialize(transformer)"
                    f".remove_hook({name!r}, recurse=True)"
                )
    return None


def _outer(
    model: torch.nn.Module, lists: Sequence[Sequence[torch.nn.Module]]
) -> Iterable[torch.nn.Module]:
    first = [block.modules() for blocks in lists for block in blocks[:1]]
    return itertools.chain([model], *lists, *first)


def _hooks(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    registry = module.__dict__.get(REGISTRY)
    if registry is not None:
        yield from registry.hooks.items()


def refuse_other_caches(parts: Iterable[object]) -> None:
    """Raise a ValueError if another cache is on one of `parts`.

    Args:
        parts: transformers, and their pipeline or None.
    """
    for part in parts:
        found = None
        if isinstance(part, torch.nn.Module):
            found = other_cache_of(part)
        elif getattr(part, "_context_manager", None) and getattr(part, "_is_cached", False):
            found = ATTRIBUTES["_is_cached"]
        if found is not None:
            raise ValueError(
                f"enable: {type(part).__name__} must have no other cache, got {found[0]}, which "
                f"skips what dbcache measures; remove it first: {found[1]}"
            )
