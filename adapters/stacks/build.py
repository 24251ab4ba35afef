"""Who decides in a model of several block stacks: each for itself, or the first one for all.

With ``decision_scope="model"`` the probe of the first stack decides. Later stacks run no probe of
their own: all their blocks but the Bn last can be skipped, their lanes share the first one's state.
"""

from __future__ import annotations

from dbcache.adapters.blocks.spec import StackSpec
from dbcache.adapters.stacks.base import BlockStack
from dbcache.adapters.stacks.pruned_stack import PrunedStack
from dbcache.adapters.stacks.row_stack import RowStack
from dbcache.adapters.stacks.stack import Stack
from dbcache.config.cache import DBCacheConfig, ParamsModifier, StackSettings
from dbcache.config.prune import DBPruneConfig
from dbcache.notices import say

OF_EACH_STACK = ("Bn_compute_blocks", "cache_dtype")
"""What stacks under one decision may differ in."""


def make_stacks(
    specs: tuple[StackSpec, ...], settings: StackSettings, modifiers: list[ParamsModifier | None]
) -> list[BlockStack]:
    """Return the stacks of one transformer; none as long as a pattern is open.

    Args:
        specs: in the order of the forward, if one is to decide for all.
        settings: what holds for all; the scope is that of the first stack.
        modifiers: what each stack does differently.

    Raises:
        ValueError: with ``decision_scope="model"``, the first stack has no block to skip after its
            probe, or a later one has a rule of its own.
    """
    if any(spec.pattern is None for spec in specs):
        return []
    each = [settings.modified(modifier) for modifier in modifiers]
    if each[0].cache.decision_scope == "stack" or len(specs) == 1:
        return [_stack(spec, own, i) for i, (spec, own) in enumerate(zip(specs, each, strict=True))]
    leader = _stack(specs[0], _with_a_middle(specs[0], each[0]), 0)
    stacks = [leader]
    for spec, own in zip(specs[1:], each[1:], strict=True):
        _check_rule(spec.name, own, leader.name, each[0])
        stacks.append(_stack(spec, own, len(stacks), leader))
    return stacks


def _stack(
    spec: StackSpec, settings: StackSettings, index: int, leader: BlockStack | None = None
) -> BlockStack:
    kind: type[BlockStack] = RowStack if settings.cache.batch_reduce == "each" else Stack
    if isinstance(settings.cache, DBPruneConfig):
        kind = PrunedStack
    return kind(spec, settings, index, leader)


def _with_a_middle(spec: StackSpec, settings: StackSettings) -> StackSettings:
    """Return settings whose probe leaves a block to skip: the decision is taken there."""
    name = spec.name
    blocks = sum(len(block_list.blocks) for block_list in spec.lists)
    blocks //= len(spec.lists) if spec.interleaved else 1
    fn, bn = settings.cache.probe_blocks, settings.cache.Bn_compute_blocks
    most = blocks - bn - 1
    if fn <= most:
        return settings
    if most < 1:
        raise ValueError(
            f"decision_scope='model': the first stack must have a probe block and a block to skip, "
            f"got {blocks} blocks in {name} with Bn_compute_blocks={bn}; lower it for this stack "
            f"(ParamsModifier), or use decision_scope='stack'"
        )
    say(
        f"{name}: Fn_compute_blocks={fn} leaves none of the {blocks} blocks to skip, and this "
        f"stack decides for the model; runs Fn={most}"
    )
    changes = DBCacheConfig(Fn_compute_blocks=most)
    return settings.modified(ParamsModifier(cache_config=changes))


def _check_rule(name: str, own: StackSettings, leader: str, rule: StackSettings) -> None:
    """Raise if a stack was given a rule that it would not follow."""
    ours, theirs = own.cache.as_dict(), rule.cache.as_dict()
    differing = [x for x in ours if x not in OF_EACH_STACK and ours[x] != theirs[x]]
    if own.predictor != rule.predictor:
        differing.append("calibrator_config")
    if differing:
        raise ValueError(
            f"decision_scope='model': {name} must have the rule of {leader}, got another "
            f"{', '.join(differing)}; a ParamsModifier of a later stack may set "
            f"{', '.join(OF_EACH_STACK)}"
        )
