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


def pytest_collection_modifyitems(items):
    """Leave out what needs a GPU where there is none."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
