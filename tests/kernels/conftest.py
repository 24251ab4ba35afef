"""Where there is no GPU, Triton kernels run in Triton's interpreter, on the CPU."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

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


@pytest.fixture(autouse=True)
def no_plans():
    """Let no test follow a launch of another one, which may have had other blocks."""
    yield
    from dbcache.kernels.common.select import forget_plans  # not before the check above

    forget_plans()


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> Callable[[str, str], list[dict]]:
    """Return a function of a script and a target: what its kernels look like, a row for each.

    They are compiled in a process of its own, without the interpreter. What was compiled before is
    kept under .pytest_cache. DBCACHE_TRITON is a folder with another Triton (see `make tritons`).
    """
    cache = pytestconfig.cache.mkdir("compiled")
    other = filter(None, [os.environ.get("DBCACHE_TRITON")])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*other, str(HERE.parents[1]), *sys.path])

    @functools.cache
    def rows(script: str, target: str) -> list[dict]:
        command = [sys.executable, str(HERE / script), target, "--cache", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return rows


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
