"""diffusers' own way to switch a cache on: ``transformer.enable_cache(DBCacheConfig(...))``.

diffusers knows a closed list of configs. `add_alias` lets the methods of one transformer know one
more; other transformers, and the class, are left alone.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

import dbcache
from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.patching.instance_method import InstanceMethod
from dbcache.config.cache import DBCacheConfig

Model = TypeVar("Model", bound=torch.nn.Module)

_NAMES = ("enable_cache", "disable_cache")
_CONFIG = "_cache_config"
"""Attribute by which diffusers knows that a cache is on."""


def add_alias(transformer: Model) -> Model:
    """Let `enable_cache` and `disable_cache` of a transformer work with dbcache's configs, too.

    Afterwards ``transformer.enable_cache(dbcache.DBCacheConfig(...))`` is what `dbcache.enable` is,
    with the same further arguments, and `is_cache_enabled` tells of it. Calling this again does
    nothing.

    Args:
        transformer: a model of diffusers with the two methods (`CacheMixin`).

    Raises:
        TypeError: it has not.
    """
    module = _module("add_alias", transformer)
    if _alias(module) is not None:
        return transformer

    def enable_cache(config: Any, **options: Any) -> None:
        if not isinstance(config, DBCacheConfig):
            _forget(module)
            enable.original(config, **options)
            return
        known = module.__dict__.get(_CONFIG)
        if known is not None and not (_is_ours(known) and not dbcache.is_enabled(module)):
            raise ValueError(
                f"enable_cache: no other cache must be on, got {type(known).__name__}; call "
                f"disable_cache first"
            )
        dbcache.enable(module, config, **options)
        module.__dict__[_CONFIG] = config

    def disable_cache() -> None:
        if not _is_ours(module.__dict__.get(_CONFIG)):
            disable.original()
            return
        dbcache.disable(module)
        del module.__dict__[_CONFIG]

    enable = InstanceMethod(module, _NAMES[0], enable_cache)
    disable = InstanceMethod(module, _NAMES[1], disable_cache)
    enable.install()
    disable.install()
    return transformer


def remove_alias(transformer: Model) -> Model:
    """Take back what `add_alias` did; a cache that is on is switched off.

    Raises:
        TypeError: `transformer` is no model of diffusers with the two methods.
    """
    module = _module("remove_alias", transformer)
    if _alias(module) is None:
        return transformer
    if _is_ours(module.__dict__.get(_CONFIG)):
        module.disable_cache()
    for name in _NAMES:
        module.__dict__[name].remove()
    return transformer


def _module(who: str, transformer: Any) -> Any:
    module = unwrap(transformer)
    if not isinstance(module, torch.nn.Module) or not all(hasattr(module, n) for n in _NAMES):
        raise TypeError(
            f"{who}: the transformer must have enable_cache and disable_cache, got "
            f"{type(module).__name__}; use dbcache.enable"
        )
    return module


def _alias(module: torch.nn.Module) -> InstanceMethod | None:
    found = module.__dict__.get(_NAMES[0])
    return found if isinstance(found, InstanceMethod) else None


def _is_ours(config: Any) -> bool:
    return isinstance(config, DBCacheConfig)


def _forget(module: torch.nn.Module) -> None:
    """Forget a config of ours whose cache was switched off by `dbcache.disable`."""
    if _is_ours(module.__dict__.get(_CONFIG)) and not dbcache.is_enabled(module):
        del module.__dict__[_CONFIG]
