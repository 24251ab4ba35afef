"""The row of the table that fits a model, as a `BlockAdapter`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dbcache.adapters.blocks.block_adapter import BlockAdapter
from dbcache.adapters.blocks.registry import BlockAdapterRegistry
from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.blocks.spec import TransformerSpec
from dbcache.adapters.models.lookup import find_specs


@dataclass(kw_only=True)
class KnownAdapter(BlockAdapter):
    """What the table says of a model: chains of lists keep one decision, as without an adapter."""

    known: list[TransformerSpec] = field(default_factory=list, repr=False)

    def specs(self) -> list[TransformerSpec]:
        return self.known


def adapter_for(target: object) -> BlockAdapter | None:
    """Return the adapter that is registered for a model, or that its row makes; None without.

    Raises:
        TypeError: `target` is a name or a class.
    """
    if isinstance(target, str | type):
        raise TypeError(
            f"get_adapter: a pipeline or a transformer must be given, got {target!r}; an adapter "
            f"names the blocks of one model, so load it first. BlockAdapterRegistry.register holds "
            f"functions by the name of a class"
        )
    registered = BlockAdapterRegistry.adapter_of(unwrap(target))
    if registered is not None:
        return registered
    try:
        specs = find_specs(target)
    except ValueError:
        return None
    stacks = [spec.stacks for spec in specs]
    return KnownAdapter(
        pipe=None if isinstance(target, torch.nn.Module) else target,
        transformer=[spec.transformer for spec in specs],
        blocks=[[x.owner.get_submodule(x.name) for s in row for x in s.lists] for row in stacks],
        forward_pattern=[[s.pattern for s in row for _ in s.lists] for row in stacks],
        has_separate_cfg=any(spec.separate_cfg for spec in specs),
        known=specs,
    )
