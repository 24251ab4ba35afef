"""diffusers' own way to switch a cache on: ``transformer.enable_cache(DBCacheConfig(...))``.

diffusers knows a closed list of configs. `add_alias` lets the methods of one transformer know one
more; other transformers, and the class, are left alone.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

import dbcache
from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.patching.announced import CONFIG, NAMES, alias_of, announce
from dbcache.adapters.patching.instance_method import InstanceMethod
from dbcache.adapters.requests.cached_transformer import handle_of
from dbcache.config.cache import DBCacheConfig

Model = TypeVar("Model", bound=torch.nn.Module)


def add_alias(transformer: Model) -> Model:
    """Let `enable_cache` and `disable_cache` of a transformer work with dbcache's configs, too.

    Afterwards ``transformer.enable_cache(dbcache.DBCacheConfig(...))`` is what `dbcache.enable` is,
    with the same further arguments, and `disable_cache` what `dbcache.disable` is;
    `is_cache_enabled` tells of the cache, however it was switched on and off. Calling this again
    does nothing.

    Args:
        transformer: a model of diffusers with the two methods (`CacheMixin`).

    Raises:
        TypeError: it has not.
    """
    module = _module("add_alias", transformer)
    if alias_of(module) is not None:
        return transformer

    def enable_cache(config: Any, **options: Any) -> None:
        if not isinstance(config, DBCacheConfig):
            enable.original(config, **options)  # which raises where another one is on
            return
        known = module.__dict__.get(CONFIG)
        if known is not None:
            raise ValueError(
                f"enable_cache: no other cache must be on, got {type(known).__name__}; call "
                f"disable_cache first"
            )
        dbcache.enable(module, config, **options)

    def disable_cache() -> None:
        if dbcache.is_enabled(module):
            dbcache.disable(module)
        else:
            disable.original()

    enable = InstanceMethod(module, NAMES[0], enable_cache)
    disable = InstanceMethod(module, NAMES[1], disable_cache)
    enable.install()
    disable.install()
    handle = handle_of(module)
    if handle is not None:
        announce(module, handle.setup.config)
    return transformer


def remove_alias(transformer: Model) -> Model:
    """Take back what `add_alias` did; a cache of dbcache's that is on is switched off.

    Raises:
        TypeError: `transformer` is no model of diffusers with the two methods.
    """
    module = _module("remove_alias", transformer)
    if alias_of(module) is None:
        return transformer
    dbcache.disable(module)
    for name in NAMES:
        module.__dict__[name].remove()
    return transformer


def _module(who: str, transformer: Any) -> Any:
    module = unwrap(transformer)
    if not isinstance(module, torch.nn.Module) or not all(hasattr(module, n) for n in NAMES):
        raise TypeError(
            f"{who}: the transformer must have enable_cache and disable_cache, got "
            f"{type(module).__name__}; use dbcache.enable"
        )
    return module
