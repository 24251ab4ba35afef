"""Fixtures and helpers for all tests. `tests/support` holds plain modules that tests import."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before any test module imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
# test modules cannot import their siblings, and tests/ itself must not be on the path: its folders
# are named like the parts of the package
sys.path.insert(0, str(Path(__file__).parent / "support"))


@pytest.fixture(scope="module")
def one_thread():
    """Run torch on one thread: faster for tiny tensors, and sums are the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plain_kernels(monkeypatch):
    """Run the references of the kernels, not Triton's interpreter: for tests of what is called."""
    monkeypatch.setenv("DBCACHE_KERNELS", "reference")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the markers
def pytest_collection_modifyitems(config, items):
    """Leave out what needs a GPU where there is none, and the whole matrix where nobody asks.

    Of the combinations of parameters, tell which are ``full``.
    """
    from matrices import mark_what_is_full

    mark_what_is_full(items)
    for item in items:
        if item.get_closest_marker("matrix") and "matrix" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m matrix"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # `keywords` has the names of folders, too
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
