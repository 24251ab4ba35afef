"""Stands for vLLM, which has no build for CPUs, so that vLLM-Omni's own cache package is imported.

Everything below `vllm` and `vllm_omni.platforms` (which asks for devices) is answered by stand-ins.
All else of `vllm_omni` is the real wheel.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
from contextlib import contextmanager
from unittest.mock import MagicMock

ROOTS = ("vllm", "vllm_omni.platforms")


def _is_stub(name: str) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in ROOTS)


class _AnyClass(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{cls.__name__}.{name}")


class _StubModule(types.ModuleType):
    """A module that has whatever is asked of it: classes by capital letters, else mocks."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "init_logger":
            value = logging.getLogger
        elif name == "QUANTIZATION_METHODS":
            value = []
        elif name == "config" and self.__name__.endswith("config.utils"):
            value = _decorator
        elif name[:1].isupper():
            members = {
                "__class_getitem__": classmethod(lambda cls, _: cls),
                "__init_subclass__": classmethod(lambda cls, **_: None),
            }
            value = _AnyClass(name, (), members)
        else:
            value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


def _decorator(cls=None, **_):
    return cls if cls is not None else lambda decorated: decorated


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if _is_stub(name) else None
        )

    def create_module(self, spec):
        module = _StubModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


@contextmanager
def engine():
    """Let `vllm_omni` be imported inside; afterwards neither it nor `vllm` is."""
    finder, before = _Finder(), set(sys.modules)
    folder = importlib.util.find_spec("vllm_omni").submodule_search_locations
    package = types.ModuleType("vllm_omni")  # its own __init__ patches vLLM
    package.__path__ = list(folder)
    sys.modules["vllm_omni"] = package
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("vllm", "vllm_omni") or "integrations.vllm" in name:
                del sys.modules[name]
