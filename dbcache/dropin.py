"""Small helpers under the names that cache-dit gives them."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
from collections.abc import Iterator

import torch

import dbcache

version_tuple = tuple(int(part) for part in dbcache.__version__.split(".") if part.isdigit())
"""The version as numbers."""


def init_logger(name: str) -> logging.Logger:
    """Return the logger of a name, below "dbcache"."""
    return logging.getLogger(name if name.startswith("dbcache") else f"dbcache.{name}")


@contextlib.contextmanager
def disable_print() -> Iterator[None]:
    """Let nothing be printed to the standard output inside."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def maybe_empty_cache() -> None:
    """Free objects that nobody holds, and give PyTorch's idle GPU memory back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
