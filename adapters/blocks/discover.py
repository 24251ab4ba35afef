"""Finds the block lists of a model that nobody described, and the pattern of their blocks.

A block's pattern is read from its forward: the names of the parameters say what it takes, the
names in its last return statement what it returns, and in which order. Where the source leaves that
open, what diffusers declares of the block counts (`declared`), else the first forward of the model
tells (`infer`): a wrong guess would swap the two streams.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import torch

from dbcache.adapters.blocks.declared import declared
from dbcache.adapters.blocks.patterns import ENCODER, HIDDEN, STREAMS, ForwardPattern
from dbcache.adapters.blocks.plain_loops import source_of
from dbcache.adapters.blocks.signature import forward_of, parameter_names, unwrap

SMALLEST_SHARE = 0.25
"""A list counts if it has this share of the parameters of the largest one: refiners do not."""


def find_blocks(
    transformer: torch.nn.Module, pattern: ForwardPattern | None
) -> list[torch.nn.ModuleList]:
    """Return the block lists of `transformer`.

    A list of blocks is a `ModuleList` of at least two modules of one class (not of PyTorch's own)
    that lies in no other such list and has at least a quarter of the parameters of the largest.

    Args:
        transformer: the model.
        pattern: what all blocks follow; lists whose source says otherwise are left out.

    Raises:
        ValueError: there is no such list.
    """
    sizes = {x: sum(p.numel() for p in x.parameters()) for x in _outermost_lists(transformer)}
    least = SMALLEST_SHARE * max(sizes.values(), default=0)
    large = [blocks for blocks, size in sizes.items() if size >= least]
    found = [blocks for blocks in large if pattern is None or _may_follow(blocks[0], pattern)]
    if not found:
        fits = f" that fit {pattern.name}" if pattern is not None else ""
        raise ValueError(
            f"BlockAdapter(auto=True): {type(transformer).__name__}: must have a ModuleList of "
            f"blocks{fits}, found none; name the lists as BlockAdapter(blocks=..., "
            f"forward_pattern=...)"
        )
    return found


def pattern_of(block: torch.nn.Module) -> ForwardPattern | None:
    """Return the pattern that the source of a block tells, else the one that diffusers declares."""
    guess, known = guess_pattern(block), declared(block)
    return known[0] if guess is None and known is not None else guess


def guess_pattern(block: torch.nn.Module) -> ForwardPattern | None:
    """Return the pattern of a block from the source of its forward, None where that is open.

    One returned stream is `HIDDEN_TO_HIDDEN`, whether or not the block also takes encoder states.
    """
    names, returned = parameter_names(block), _returned_names(block)
    if returned is None or None in returned or not (HIDDEN in names or names[:1] == ["x"]):
        return None
    if len(returned) == 1:
        return ForwardPattern.HIDDEN_TO_HIDDEN if returned[0] in names else None
    if len(returned) != 2 or set(returned) != set(STREAMS):
        return None
    return ForwardPattern((STREAMS if ENCODER in names else (HIDDEN,), tuple(returned)))


def _may_follow(block: torch.nn.Module, pattern: ForwardPattern) -> bool:
    """Say whether the source of a block's forward leaves it open that it follows `pattern`."""
    guess, returned = guess_pattern(block), _returned_names(block)
    if guess is not None:
        return guess.returns == pattern.returns
    return returned is None or len(returned) in (1, len(pattern.returns))


def _outermost_lists(module: torch.nn.Module) -> Iterator[torch.nn.ModuleList]:
    """Yield the lists of blocks in no other such list, in the order of definition."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList) and _are_blocks(child):
            yield child
        else:
            yield from _outermost_lists(child)


def _are_blocks(modules: torch.nn.ModuleList) -> bool:
    if len(modules) < 2 or len({type(module) for module in modules}) != 1:
        return False
    block = unwrap(modules[0])
    return not type(block).__module__.startswith("torch.") and bool(parameter_names(block))


def _returned_names(block: torch.nn.Module) -> list[str | None] | None:
    """Return the names of what the forward returns last, None for what has none or is unknown."""
    function = source_of(forward_of(block))
    returns = [] if function is None else [*_returns_in(function)]
    if not returns:
        return None
    value = max(returns, key=lambda node: node.lineno).value
    elements = value.elts if isinstance(value, ast.Tuple) else [value]
    return [element.id if isinstance(element, ast.Name) else None for element in elements]


def _returns_in(node: ast.AST) -> Iterator[ast.Return]:
    """Go through the returns of a function, not those of functions inside."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _returns_in(child)
