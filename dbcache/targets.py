"""What `enable` and its like are given: which pipeline, transformers and handles a target means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from dbcache.adapters.blocks.block_adapter import BlockAdapter
from dbcache.adapters.blocks.registry import BlockAdapterRegistry
from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.blocks.spec import TransformerSpec
from dbcache.adapters.models.lookup import check_target, find_specs
from dbcache.adapters.patching.whole_compile import wrappers_in
from dbcache.adapters.pipelines.cached_pipeline import CachedPipeline
from dbcache.adapters.requests.cached_transformer import CachedTransformer, handle_of
from dbcache.config.parallelism import ParallelismConfig
from dbcache.lanes.sharding import Sharding


def resolve(target: object) -> tuple[Any, BlockAdapter | None]:
    """Return (pipeline or None, adapter or None: the table of models says what to cache)."""
    if isinstance(target, BlockAdapter):
        return target.pipe, target
    pipe = None if isinstance(target, torch.nn.Module) or not callable(target) else target
    return pipe, BlockAdapterRegistry.adapter_of(unwrap(target))


def shardings_of(
    specs: list[TransformerSpec], pipe: Any, config: ParallelismConfig | None, groups: Sequence[Any]
) -> Sequence[Sharding | None]:
    """Return which ranks share each transformer, and how; checked, not yet done."""
    if not dist.is_available():
        return [None] * len(specs)
    from dbcache.parallel.handle import prepare  # torch.distributed only where it is used
    from dbcache.parallel.together import Together

    modules = [spec.transformer for spec in specs]
    if config is not None:
        return prepare(modules, config, pipe, groups)
    shared = [Together(module, groups) for module in modules]
    for together in shared:
        together.look()
    return shared


def groups_named(who: str, given: Any) -> list[Any]:
    """Return the process groups that a user names, see `together.named_groups`."""
    if given is None:
        return []
    from dbcache.parallel.together import named_groups

    return named_groups(who, given)


def agreement(
    target: object, config: ParallelismConfig | None, groups: Sequence[Any]
) -> AbstractContextManager[Callable[[Mapping[str, str]], None]]:
    """Return where the ranks that share a target see that all of them enable it alike."""
    if not dist.is_available():
        return nullcontext(lambda facts: None)
    from dbcache.parallel.found import found_groups, is_distributed
    from dbcache.parallel.together import Agreement, Ranks, groups_of

    ranks = Ranks(groups)
    if is_distributed():
        if config is not None:
            ranks.add(groups_of(config))
        for module in _modules(target):
            ranks.add(group for found in found_groups(module).values() for group in found)
    return Agreement("enable", ranks)


def has_to_go_first(target: object, config: ParallelismConfig | None) -> bool:
    """Whether a cache that is on must be disabled first: what is spread cannot be checked."""
    handles = enabled_or_none(target)
    is_spread = any(getattr(handle.setup.sharding, "spreads", False) for handle in handles)
    return is_spread or (bool(handles) and config is not None)


def _modules(target: object) -> list[torch.nn.Module]:
    """Return the transformers of a target, none where it has no supported ones."""
    _, adapter = resolve(target)
    if adapter is not None:
        return list(adapter.transformers())
    try:
        return [spec.transformer for spec in find_specs(target)]
    except (TypeError, ValueError):
        return []


def parts(target: object) -> list[object]:
    """Return the objects that may carry a handle, pipeline first.

    A pipeline that is not called, but has methods of other names, carries none: its modules do. A
    pipeline that is not enabled stands for those of its transformers that were enabled alone.
    """
    if isinstance(target, BlockAdapter):
        return [part for part in (target.pipe, *target.transformers()) if part is not None]
    whole = unwrap(target)
    if isinstance(whole, torch.nn.Module) or handle_of(whole) is not None:
        return [whole]
    attributes = list(getattr(whole, "__dict__", {}).values())  # a call sets some meanwhile
    own = [unwrap(x) for x in attributes if isinstance(x, torch.nn.Module)]
    return [whole, *(x for x in own if not callable(whole) or _is_enabled_alone(x))]


def _is_enabled_alone(module: object) -> bool:
    handle = handle_of(module)
    return handle is not None and handle.enabled.alone is not None and not handle.enabled.owners


def name_of(target: object) -> str:
    """Return the class of the pipeline or transformer that a target means."""
    return type(unwrap(parts(target)[0])).__name__


def wrappers(target: object) -> list[Any]:
    """Return what `torch.compile` made of the transformers of `target`."""
    given: list[object] = [target]
    if isinstance(target, BlockAdapter):
        transformer = target.transformer
        given = [target.pipe]
        given += transformer if isinstance(transformer, list | tuple) else [transformer]
    pipes = [part for part in given if not isinstance(part, torch.nn.Module)]
    return wrappers_in(
        [*given, *(own for pipe in pipes for own in list(vars(pipe or object).values()))]
    )


def enabled(target: object, who: str) -> list[CachedTransformer]:
    """Return the handles of the transformers of `target`."""
    check_target(who, target)
    handles = enabled_or_none(target)
    if not handles:
        raise RuntimeError(
            f"{who}: the cache must be enabled on it first, got {type(target).__name__}; call "
            f"dbcache.enable"
        )
    return handles


def enabled_or_none(target: object) -> list[CachedTransformer]:
    """Return the handles of the transformers of `target`, none where the cache is not on."""
    for part in parts(target):
        handle = handle_of(part)
        if isinstance(handle, CachedPipeline):
            return [transformer for transformer, _ in handle.transformers]
        if handle is not None:
            found = [handle_of(module) for module in parts(target)]
            return [transformer for transformer in found if transformer is not None]
    return []
