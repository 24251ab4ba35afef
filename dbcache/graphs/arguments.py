"""The arguments of a call as a flat list of leaves and their structure, and back.

As `torch.utils._pytree` does it, which is asked only where an argument is a container: most are
tensors, and this is done on every step.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

LEAVES = frozenset((torch.Tensor, type(None), bool, int, float, str))
"""Types of arguments that hold nothing else."""

Structure = tuple[tuple[int | str, TreeSpec | None], ...]
"""Per argument: its place or its name, and how its leaves make it; None where it is one."""


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Structure]:
    """Return the leaves of all arguments, in order, and how they make the arguments."""
    leaves: list[Any] = []
    structure: list[tuple[Any, TreeSpec | None]] = []
    for name, value in chain(enumerate(args), kwargs.items()):
        parts, spec = ([value], None) if type(value) in LEAVES else tree_flatten(value)
        leaves += parts
        structure.append((name, spec))
    return leaves, tuple(structure)


def unflatten(leaves: list[Any], structure: Structure) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) that are made of other leaves."""
    args, kwargs, rest = [], {}, iter(leaves)
    for name, spec in structure:
        parts = [*islice(rest, 1 if spec is None else spec.num_leaves)]
        value = parts[0] if spec is None else tree_unflatten(parts, spec)
        if isinstance(name, str):
            kwargs[name] = value
        else:
            args.append(value)
    return tuple(args), kwargs
