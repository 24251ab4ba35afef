"""Which modules of an engine's pipeline are cached, and what their blocks look like."""

from __future__ import annotations

import copy
import logging
from operator import attrgetter
from typing import Any

import torch

from dbcache.adapters.blocks.block_adapter import BlockAdapter
from dbcache.adapters.blocks.patterns import ForwardPattern
from dbcache.adapters.blocks.registry import BlockAdapterRegistry
from dbcache.adapters.blocks.signature import unwrap
from dbcache.integrations.blocks import known_or_auto

DECLARED = "_cache_dit_adapter_config"
"""Attribute by which a model of the engine says what its blocks look like."""


def transformers(pipeline: Any) -> list[torch.nn.Module]:
    """Return the denoising modules that a pipeline has, each once.

    Raises:
        ValueError: it has none.
    """
    names = getattr(pipeline, "_dit_modules", None)
    if not isinstance(names, list | tuple):
        names = ("transformer", "transformer_2")
    found: dict[int, torch.nn.Module] = {}
    for name in names:
        try:
            module = unwrap(attrgetter(name)(pipeline))
        except AttributeError:
            continue
        if isinstance(module, torch.nn.Module):
            found[id(module)] = module
    if not found:
        raise ValueError(
            f"dbcache: {type(pipeline).__name__} must have a denoising module under one of "
            f"{list(names)}, got none; start the engine without --cache-backend"
        )
    return list(found.values())


def target_of(module: torch.nn.Module, log: logging.Logger) -> Any:
    """Return what `dbcache.enable` takes for a module: itself, or an adapter.

    An adapter that the user registered comes first, then what the model declares, then the table
    of models, then what its source tells.

    Raises:
        ValueError: the model needs a cached adapter of its own, or is known not to work.
    """
    name = type(module).__name__
    if BlockAdapterRegistry.adapter_of(module) is not None:
        return module
    declared = getattr(module, DECLARED, None)
    if declared is not None:
        if declared.cached_adapter_cls is not None:
            raise ValueError(
                f"dbcache: {name} cannot be cached: its blocks need a cached adapter of their own "
                f"({declared.cached_adapter_cls.__name__}), which cache-dit alone runs; use "
                f"--cache-backend cache_dit"
            )
        paths = declared.block_forward_patterns
        return BlockAdapter(
            transformer=module,
            blocks=[attrgetter(path)(module) for path in paths],
            forward_pattern=[ForwardPattern[pattern.name] for pattern in paths.values()],
            has_separate_cfg=declared.has_separate_cfg,
        )
    return known_or_auto(module, log)


def split_steps(pipeline: Any, steps: int, modules: int) -> list[int | None]:
    """Return how many steps of a request each module runs; None where that is not known.

    Of two experts the first one runs while the time is above `boundary_ratio` (Wan 2.2).
    """
    if modules == 1:
        return [steps]
    boundary: Any = getattr(pipeline, "boundary_ratio", None)
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if modules != 2 or boundary is None or not hasattr(scheduler, "set_timesteps"):
        return [None] * modules
    scheduler = copy.deepcopy(scheduler)  # that of the pipeline is left alone
    scheduler.set_timesteps(steps)
    times = torch.as_tensor(scheduler.timesteps)
    first = int((times >= boundary * scheduler.config.num_train_timesteps).sum())
    return [first or None, steps - first or None]
