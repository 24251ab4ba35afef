"""The paths that cache-dit's users import from: ``from cache_dit.caching import BlockAdapter``."""

from __future__ import annotations

import dbcache


def __getattr__(name: str) -> object:
    if name.startswith("_"):
        raise AttributeError(f"module 'dbcache.caching' has no attribute {name!r}")
    return getattr(dbcache, name)
