"""Lets diffusers' `is_cache_enabled` say whether the cache is on, of transformers with the alias.

diffusers takes a cache for on while `_cache_config` is not None.
"""

from __future__ import annotations

from typing import Any

import torch

from dbcache.adapters.patching.instance_method import InstanceMethod
from dbcache.config.cache import DBCacheConfig

NAMES = ("enable_cache", "disable_cache")
"""Methods that the alias replaces."""

CONFIG = "_cache_config"


def alias_of(module: torch.nn.Module) -> InstanceMethod | None:
    """Return what stands in place of `enable_cache`, None without the alias."""
    found = module.__dict__.get(NAMES[0])
    return found if isinstance(found, InstanceMethod) else None


def announce(module: torch.nn.Module, config: DBCacheConfig | None) -> None:
    """Take note of the config in force, None where the cache is off; another cache's is left."""
    known: Any = module.__dict__.get(CONFIG)
    if known is not None and not isinstance(known, DBCacheConfig):
        return
    module.__dict__.pop(CONFIG, None)
    if config is not None and alias_of(module) is not None:
        module.__dict__[CONFIG] = config


def unannounced(own: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a module without the config: a copy has its cache off."""
    is_ours = isinstance(own.get(CONFIG), DBCacheConfig)
    return {name: value for name, value in list(own.items()) if not (is_ours and name == CONFIG)}
