"""dbcache as a cache backend of vLLM-Omni: ``vllm serve ... --omni --cache-backend dbcache``.

`register` is the entry point (group ``vllm_omni.general_plugins``), which the engine calls in each
of its processes. The engine has no registry of cache backends, but one function that makes them, so
that function is replaced by one that knows one name more, once a process imports it. Nothing else
is touched; pipelines only with ``--cache-backend dbcache``.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import logging
import sys
from importlib.machinery import ModuleSpec
from typing import Any

NAME = "dbcache"
MODULE = "vllm_omni.diffusion.cache.selector"
FUNCTION = "get_cache_backend"


def register() -> None:
    """Let vLLM-Omni know the cache backend "dbcache"; calling this again does nothing.

    Processes that run no diffusion model never import the function, and nothing happens in them.
    """
    if MODULE in sys.modules:
        _extend(sys.modules[MODULE])
    elif not any(isinstance(finder, _Awaited) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaited())


def unregister() -> None:
    """Take back what `register` did; backends that the engine has made go on."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Awaited)]
    selector: Any = sys.modules.get(MODULE)
    ours: Any = getattr(selector, FUNCTION, None)
    if hasattr(ours, "without_dbcache"):
        _replace(ours, ours.without_dbcache)


class _Awaited(importlib.abc.MetaPathFinder):
    """Extends the engine's module when it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                _extend(module)

            loader.exec_module = exec_module
        return spec


def _extend(selector: Any) -> None:
    """Let the engine's function know one name more."""
    original = getattr(selector, FUNCTION, None)
    if hasattr(original, "without_dbcache"):
        return
    if not callable(original):  # the engine works on, without this backend
        logging.getLogger("vllm_omni.dbcache").warning(
            "dbcache: --cache-backend dbcache is not known, since this vLLM-Omni has no %s in %s; "
            "install vllm-omni 0.30, or uninstall dbcache-dit",
            FUNCTION,
            MODULE,
        )
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


def _replace(old: Any, new: Any) -> None:
    """Put `new` where the engine's modules have `old`: some import it by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm_omni.") and vars(module).get(FUNCTION) is old:
            setattr(module, FUNCTION, new)
