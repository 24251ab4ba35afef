"""What single block stacks do differently: one `ParamsModifier` per stack or list of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dbcache.adapters.blocks.block_adapter import like_blocks
from dbcache.adapters.blocks.spec import StackSpec, TransformerSpec
from dbcache.config.cache import ParamsModifier, StackSettings, alike
from dbcache.given import PerTransformer

Modified = tuple[list[TransformerSpec], list[list[ParamsModifier | None]]]


def modified(
    specs: list[TransformerSpec],
    given: ParamsModifier | Sequence[Any] | None,
    settings: StackSettings,
) -> Modified:
    """Return the transformers, and one modifier per stack of each.

    Args:
        specs: what is to be cached.
        given: to `enable`, one per stack; None: those of the adapter. Where a stack is a chain of
            lists there may be one per list: a chain whose modifiers come to the same stays one
            stack, else each of its lists is a stack with a decision of its own.
        settings: what they modify.

    Raises:
        TypeError, ValueError: there are not as many as stacks or lists; or lists whose blocks run
            in turn are given different ones.
    """
    if isinstance(given, PerTransformer):
        if len(given) != len(specs):
            raise ValueError(
                f"enable: the schedule must have a part for each transformer, got {len(given)} for "
                f"{len(specs)}; use one that was made for this pipeline"
            )
        return specs, [[each] * len(spec.stacks) for each, spec in zip(given, specs, strict=True)]
    if given is None:
        return specs, [[stack.modifier for stack in spec.stacks] for spec in specs]
    who, counts = "enable: params_modifiers", [len(spec.stacks) for spec in specs]
    lists = [sum(len(stack.lists) for stack in spec.stacks) for spec in specs]
    if isinstance(given, list | tuple) and lists != counts:
        nested = [len(row) for row in given if isinstance(row, list | tuple)]
        if lists in (nested, [len(given)]) or (not nested and len(given) == sum(lists)):
            rows = like_blocks(who, given, lists, ParamsModifier)
            pairs = [_per_list(spec, row, settings) for spec, row in zip(specs, rows, strict=True)]
            return [spec for spec, _ in pairs], [row for _, row in pairs]
    return specs, like_blocks(who, given, counts, ParamsModifier)


def _per_list(
    spec: TransformerSpec, row: list[ParamsModifier], settings: StackSettings
) -> tuple[TransformerSpec, list[ParamsModifier | None]]:
    """Return a transformer whose chains are split where their lists differ."""
    stacks: list[StackSpec] = []
    modifiers: list[ParamsModifier | None] = []
    rest = iter(row)
    for stack in spec.stacks:
        own = [next(rest) for _ in stack.lists]
        if alike(settings, own):
            stacks.append(stack)
            modifiers.append(own[0])
        elif stack.interleaved:
            raise ValueError(
                f"enable: params_modifiers of {stack.name} must all be the same, since a block of "
                f"each list runs in turn, got different ones; give one for all of them"
            )
        else:
            stacks += [replace(stack, lists=(block_list,)) for block_list in stack.lists]
            modifiers += own
    return replace(spec, stacks=tuple(stacks)), modifiers
