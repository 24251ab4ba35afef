"""Finds the block lists of a model that nobody described, and the pattern of their blocks.

A block's pattern is read from its forward: the names of the parameters say what it takes, the
names in its last return statement what it returns, and in which order. Where the source leaves that
open, what diffusers declares of the block counts (`declared`), else the first forward of the model
tells (`infer`): a wrong guess would swap the two streams.
"""

from __future__ import annotations

import ast
import inspect
import textwrap

import torch

from dbcache.adapters.blocks.declared import declared
from dbcache.adapters.blocks.patterns import ENCODER, HIDDEN, ForwardPattern
from dbcache.adapters.blocks.signature import forward_of, parameter_names, unwrap

SMALLEST_SHARE = 0.25
"""A list counts if it has this share of the parameters of the largest one: refiners do not."""


def find_blocks(
    transformer: torch.nn.Module, pattern: ForwardPattern | None
) -> tuple[list[torch.nn.ModuleList], list[ForwardPattern | None]]:
    """Return the block lists of `transformer` and the pattern of each, None where that is open.

    A list of blocks is a `ModuleList` of at least two modules of one class (not of PyTorch's own)
    that lies in no other such list and has at least a quarter of the parameters of the largest.

    Args:
        transformer: the model.
        pattern: what all blocks follow; lists whose source says otherwise are left out. None
            reads it from the source.

    Raises:
        ValueError: there is no such list.
    """
    who = f"BlockAdapter(auto=True): {type(transformer).__name__}"
    found = _candidates(transformer)
    if pattern is not None:
        found = {path: blocks for path, blocks in found.items() if _may_follow(blocks[0], pattern)}
    if not found:
        fits = f" that fit {pattern.name}" if pattern is not None else ""
        raise ValueError(
            f"{who}: must have a ModuleList of blocks{fits}, found none; name the lists as "
            f"BlockAdapter(blocks=..., forward_pattern=...)"
        )
    lists = list(found.values())
    return lists, [pattern or pattern_of(blocks[0]) for blocks in lists]


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
    streams = (HIDDEN, ENCODER)
    if set(returned) != set(streams) or len(returned) != 2:
        return None
    takes = streams if ENCODER in names else (HIDDEN,)
    return ForwardPattern(
        (takes, (HIDDEN, ENCODER) if returned[0] == HIDDEN else (ENCODER, HIDDEN))
    )


def _may_follow(block: torch.nn.Module, pattern: ForwardPattern) -> bool:
    """Say whether the source of a block's forward leaves it open that it follows `pattern`."""
    guess, returned = guess_pattern(block), _returned_names(block)
    if guess is not None:
        return guess.returns == pattern.returns
    return returned is None or len(returned) in (1, len(pattern.returns))


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
    block = unwrap(modules[0])
    return not type(block).__module__.startswith("torch.") and bool(parameter_names(block))


def _returned_names(block: torch.nn.Module) -> list[str | None] | None:
    """Return the names of what the forward returns last, None for what has none or is unknown."""
    try:
        source = textwrap.dedent(inspect.getsource(forward_of(block)))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):  # no source of its own: made at run time, a lambda
        return None
    returns = [node for node in _own_nodes(function) if isinstance(node, ast.Return)]
    if not returns:
        return None
    value = max(returns, key=lambda node: node.lineno).value
    elements = value.elts if isinstance(value, ast.Tuple) else [value]
    return [element.id if isinstance(element, ast.Name) else None for element in elements]


def _own_nodes(function: ast.AST) -> list[ast.AST]:
    """Return the nodes of a function without those of functions inside of it."""
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            nodes += [child, *_own_nodes(child)]
    return nodes
