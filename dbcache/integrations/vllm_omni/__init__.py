"""dbcache as a cache backend of vLLM-Omni: ``vllm serve ... --omni --cache-backend dbcache``.

`register` is the entry point (group ``vllm_omni.general_plugins``), which the engine calls in each
of its processes. The engine has no registry of cache backends, but one function that makes them, so
that function is replaced by one that knows one name more. Nothing else is touched; pipelines only
with ``--cache-backend dbcache``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

NAME = "dbcache"
SELECTOR = "get_cache_backend"


def register() -> None:
    """Let vLLM-Omni know the cache backend "dbcache"; calling this again does nothing.

    Raises:
        ImportError: vLLM-Omni is not installed.
    """
    from vllm_omni.diffusion.cache import selector

    original = getattr(selector, SELECTOR)
    if hasattr(original, "without_dbcache"):
        return

    @functools.wraps(original)
    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        if cache_backend == NAME:
            from dbcache.integrations.vllm_omni.backend import backend_class

            return backend_class()(cache_config)
        try:
            return original(cache_backend, cache_config)
        except ValueError as error:
            raise ValueError(f"{error}, {NAME!r}") from error

    get_cache_backend.without_dbcache = original  # type: ignore[attr-defined]
    _replace(original, get_cache_backend)


def unregister() -> None:
    """Take back what `register` did; backends that the engine has made go on."""
    selector: Any = sys.modules.get("vllm_omni.diffusion.cache.selector")
    ours: Any = getattr(selector, SELECTOR, None)
    if hasattr(ours, "without_dbcache"):
        _replace(ours, ours.without_dbcache)


def _replace(old: Any, new: Any) -> None:
    """Put `new` where the engine's modules have `old`: some import it by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm_omni.") and vars(module).get(SELECTOR) is old:
            setattr(module, SELECTOR, new)
