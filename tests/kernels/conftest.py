"""Where there is no GPU, Triton kernels run in Triton's interpreter, on the CPU."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    kernels = ("decision.probe_diff", "decision.decide", "prediction.predict", "prediction.commit")
    for path in kernels:
        module, name = sys.modules.get(f"dbcache.kernels.{path}"), path.partition(".")[2]
        kernel = getattr(module, f"_{name}_kernel", None)
        if kernel is not None and type(kernel).__name__ != "InterpretedFunction":
            raise pytest.UsageError(
                "dbcache.kernels was imported before tests/kernels/conftest.py could turn on "
                "Triton's interpreter; set TRITON_INTERPRET=1"
            )


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return where Triton runs here: a GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def random(device: torch.device):
    """Return a function that makes normal random tensors, the same ones in each run."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return make


@pytest.fixture
def integers(device: torch.device):
    """Return a function that makes small random integers, whose sums are exact in all dtypes."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=generator).to(device, dtype)

    return make
