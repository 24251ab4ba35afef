"""Fixtures and helpers for all tests. `tests/support` holds plain modules that tests import."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
# test modules cannot import their siblings, and tests/ itself must not be on the path: its folders
# are named like the parts of the package
sys.path.insert(0, str(Path(__file__).parent / "support"))


@pytest.fixture(scope="module")
def one_thread():
    """Run torch on one thread: faster for tiny tensors, and sums are the same everywhere."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
