"""Finds what to cache of a model that the table of models knows.

A transformer's class is matched by name along the method resolution order, so that nothing is
imported and subclasses count; a pipeline is supported if one of its components is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dbcache.adapters.blocks.block_adapter import check_signatures
from dbcache.adapters.blocks.block_list import BlockList
from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.blocks.spec import TransformerSpec
from dbcache.adapters.models.row import ModelRow
from dbcache.adapters.models.table import ELSEWHERE, MODELS, REFUSED
from dbcache.config.options import shown

_ROWS = {row.transformer: row for row in (*MODELS, *ELSEWHERE)}


NO_COPIES = (
    ", and call that: DataParallel would copy the model, without its cache, on each call; for "
    "several GPUs run a process for each (docs/parallel.md)"
)


def _known(module: object) -> str | None:
    """Return the name of the nearest class that has a row or a refusal, None without."""
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((name for name in names if name in _ROWS or name in REFUSED), None)


def row_of(module: object) -> ModelRow | None:
    """Return the row of a transformer's class or of the nearest base that has one."""
    return _ROWS.get(_known(module) or "")


def refusal_of(module: object) -> str | None:
    """Return why a transformer's class cannot be cached, None where nothing speaks against it."""
    name = _known(module)
    return f"{name} {REFUSED[name]}" if name in REFUSED else None


def check_target(who: str, target: object) -> None:
    """Raise a TypeError for what can be no pipeline, transformer or adapter: lists, names."""
    if not hasattr(target, "__dict__"):
        raise TypeError(
            f"{who}: target must be a pipeline, a transformer or a BlockAdapter, got "
            f"{shown(target)}; call it with each pipeline by itself"
        )


def find_specs(target: Any) -> list[TransformerSpec]:
    """Return what to cache of a transformer or of a pipeline's transformers.

    Raises:
        TypeError: it is neither. ValueError: no row fits; the error tells why, or lists the rows
            there are.
    """
    check_target("dbcache.enable", target)
    parts = [target] if isinstance(target, torch.nn.Module) else [*vars(target).values()]
    candidates = [unwrap(part) for part in parts if isinstance(part, torch.nn.Module)]
    specs = [_spec(module, row) for module in candidates if (row := row_of(module)) is not None]
    refusals = [reason for module in candidates if (reason := refusal_of(module)) is not None]
    if specs:
        return specs
    if refusals:
        raise ValueError(
            f"dbcache.enable: {type(target).__name__} cannot be cached: {'; '.join(refusals)}"
        )
    refuse_wrapped(candidates)
    known = "\n".join(f"  {row.transformer}: {row.models}" for row in MODELS)
    raise ValueError(
        f"dbcache.enable: the transformer must be a supported one, got "
        f"{type(target).__name__} with {[type(c).__name__ for c in candidates]}.\n"
        f"Supported:\n{known}\n"
        f"Any other model works through a BlockAdapter that names its lists of blocks:\n"
        f"  dbcache.enable(dbcache.BlockAdapter(pipe=pipe, transformer=pipe.transformer,\n"
        f"      blocks=pipe.transformer.transformer_blocks,\n"
        f"      forward_pattern=dbcache.ForwardPattern.Pattern_0))"
    )


def refuse_wrapped(candidates: list[Any]) -> None:
    """Raise if one of them is a supported model within a wrapper that spreads it."""
    for outer in candidates:
        inner = unwrap(getattr(outer, "module", None))
        if isinstance(inner, torch.nn.Module) and row_of(inner) is not None:
            who = type(outer).__name__
            more = NO_COPIES if who == "DataParallel" else ""
            raise ValueError(
                f"dbcache.enable: the transformer itself must be given, got {who} around "
                f"{type(inner).__name__}; pass its .module{more}"
            )


def _spec(module: torch.nn.Module, row: ModelRow) -> TransformerSpec:
    """Find the lists of a row in the module; lists that its config leaves empty do not count."""
    stacks = []
    for paths, stack in row.stacks:
        found = [BlockList(module, path) for path in paths]
        lists = tuple(block_list for block_list in found if block_list.blocks)
        assert stack.pattern is not None  # the table has them all
        for block_list in lists:
            check_signatures(block_list, stack.pattern, stack.streams)
        if lists:
            stacks.append(replace(stack, lists=lists, long_skips=row.long_skips))
    return TransformerSpec(module, tuple(stacks), row.separate_cfg, row.fills)
