"""All tests of requests run the kernels' references, on one thread of torch."""

import pytest


@pytest.fixture(autouse=True)
def quick(one_thread, plain_kernels):
    """Run torch on one thread, and no interpreter."""
