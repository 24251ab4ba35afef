"""What to cache of an engine's own class of a model."""

from __future__ import annotations

import logging
from typing import Any

import torch

from dbcache.adapters.blocks.block_adapter import BlockAdapter
from dbcache.adapters.blocks.registry import BlockAdapterRegistry
from dbcache.adapters.models.lookup import find_specs, refusal_of, row_of


def known_or_auto(module: torch.nn.Module, log: logging.Logger) -> Any:
    """Return what `dbcache.enable` takes for a module: itself where it is known, or an adapter.

    An adapter that the user registered comes first, then the table of models, then what its source
    tells: engines have classes of the names of diffusers' in other forms.
    """
    if BlockAdapterRegistry.adapter_of(module) is not None or refusal_of(module) is not None:
        return module  # where it is refused, `enable` says why
    if row_of(module) is not None:
        try:
            find_specs(module)
        except (AttributeError, ValueError) as error:  # the engine's class has another form
            name = type(module).__name__
            log.info("dbcache: %s is not that of diffusers (%s); reads its source", name, error)
        else:
            return module
    return BlockAdapter(transformer=module, auto=True)
