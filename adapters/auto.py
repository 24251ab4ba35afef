"""Finds the block lists of a model that nobody described, and the pattern of their blocks.

A block's pattern is read from its forward: the names of the parameters say what it takes, the
names in its last return statement what it returns, and in which order. Where the source leaves that
open, the caller must name the pattern: a wrong guess would swap the two streams.
"""

from __future__ import annotations

import ast
import inspect
import textwrap

import torch

from dbcache.adapters.guards import forward_of, parameter_names
from dbcache.adapters.patterns import ENCODER, HIDDEN, ForwardPattern

SMALLEST_SHARE = 0.25
"""A list counts if it has this share of the parameters of the largest one: refiners do not."""


def find_blocks(
    transformer: torch.nn.Module, pattern: ForwardPattern | None
) -> tuple[list[torch.nn.ModuleList], list[ForwardPattern]]:
    """Return the block lists of `transformer` and the pattern of each.

    A list of blocks is a `ModuleList` of at least two modules of one class whose forward takes
    `hidden_states` (or `x`), that lies in no other such list and has at least a quarter of the
    parameters of the largest one.

    Args:
        transformer: the model.
        pattern: what all blocks follow; lists whose source says otherwise are left out. None
            reads it from the source.

    Raises:
        ValueError: there is no such list, or the source does not tell the pattern of one.
    """
    who = f"BlockAdapter(auto=True): {type(transformer).__name__}"
    found = _candidates(transformer)
    if pattern is not None:
        found = {
            path: blocks
            for path, blocks in found.items()
            if (guess := guess_pattern(blocks[0])) is None or guess.returns == pattern.returns
        }
    if not found:
        fits = f" that fit {pattern.name}" if pattern is not None else ""
        raise ValueError(
            f"{who}: must have a ModuleList of blocks{fits} whose forward takes hidden_states, "
            f"found none; name the lists as BlockAdapter(blocks=..., forward_pattern=...)"
        )
    if pattern is not None:
        return list(found.values()), [pattern] * len(found)
    return list(found.values()), [pattern_of(blocks, f"{who}.{p}") for p, blocks in found.items()]


def pattern_of(blocks: torch.nn.ModuleList, who: str) -> ForwardPattern:
    """Return the pattern that the source of the first block tells.

    Raises:
        ValueError: it does not tell one.
    """
    pattern = guess_pattern(blocks[0])
    if pattern is None:
        block = type(blocks[0]).__name__
        raise ValueError(
            f"{who}: the forward of {block} must name its streams hidden_states and "
            f"encoder_hidden_states in its parameters and its last return, got parameters "
            f"{parameter_names(blocks[0])}; pass forward_pattern=ForwardPattern.Pattern_0 ... 5"
        )
    return pattern


def guess_pattern(block: torch.nn.Module) -> ForwardPattern | None:
    """Return the pattern of a block from the source of its forward, None where that is open.

    One returned stream is `HIDDEN_TO_HIDDEN`, whether or not the block also takes encoder states.
    """
    returned = _returned_names(block)
    if returned is None:
        return None
    if len(returned) == 1:
        return ForwardPattern.HIDDEN_TO_HIDDEN
    streams = (HIDDEN, ENCODER)
    if len(returned) != 2 or sorted(returned) != sorted(streams):
        return None
    takes = streams if ENCODER in parameter_names(block) else (HIDDEN,)
    return ForwardPattern((takes, tuple(returned)))


def _candidates(transformer: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """Return the lists of blocks by path, in the order of definition."""
    found: dict[str, torch.nn.ModuleList] = {}
    for path, module in transformer.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, torch.nn.ModuleList) and not inside and _are_blocks(module):
            found[path] = module
    sizes = {path: sum(p.numel() for p in blocks.parameters()) for path, blocks in found.items()}
    least = SMALLEST_SHARE * max(sizes.values(), default=0)
    return {path: blocks for path, blocks in found.items() if sizes[path] >= least}


def _are_blocks(modules: torch.nn.ModuleList) -> bool:
    if len(modules) < 2 or len({type(module) for module in modules}) != 1:
        return False
    names = parameter_names(modules[0])
    return HIDDEN in names or names[:1] == ["x"]


def _returned_names(block: torch.nn.Module) -> list[str] | None:
    """Return the names of what the forward returns last; None where they are not all names."""
    try:
        source = textwrap.dedent(inspect.getsource(forward_of(block)))
    except (OSError, TypeError):  # no source at hand: made at run time, or compiled
        return None
    function = ast.parse(source).body[0]
    returns = [node for node in _own_nodes(function) if isinstance(node, ast.Return)]
    if not returns:
        return None
    value = max(returns, key=lambda node: node.lineno).value
    elements = value.elts if isinstance(value, ast.Tuple) else [value]
    names = [element.id for element in elements if isinstance(element, ast.Name)]
    return names if len(names) == len(elements) else None


def _own_nodes(function: ast.AST) -> list[ast.AST]:
    """Return the nodes of a function without those of functions inside of it."""
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            nodes += [child, *_own_nodes(child)]
    return nodes
