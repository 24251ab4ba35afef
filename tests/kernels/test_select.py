import pytest
import torch

from dbcache.kernels.common import select as _select
from dbcache.kernels.common.select import select

CPU = torch.zeros(1)


class OnGpu(torch.Tensor):
    """A CPU tensor that claims to be on a GPU."""

    is_cuda = True


GPU = OnGpu(1)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Set variables for one test: `environment(NAME="value")`, None to unset."""

    def set_variables(**variables):
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        _select.reset_environment()

    set_variables(DBCACHE_KERNELS=None, TRITON_INTERPRET=None)
    yield set_variables
    monkeypatch.undo()
    _select.reset_environment()


def test_auto_takes_triton_on_a_gpu_and_the_reference_elsewhere():
    assert select("auto", GPU) == "triton"
    assert select("auto", CPU) == "reference"


def test_auto_takes_the_reference_on_the_cpu_even_with_the_interpreter(environment):
    environment(TRITON_INTERPRET="1")
    assert select("auto", CPU) == "reference"


def test_a_name_is_taken_literally(environment):
    assert select("reference", GPU) == "reference"
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1, got cpu"):
        select("triton", CPU)
    environment(TRITON_INTERPRET="1")
    assert select("triton", CPU) == "triton"


def test_the_environment_overrides_auto_only(environment):
    environment(DBCACHE_KERNELS="reference")
    assert select("auto", GPU) == "reference"
    assert select("triton", GPU) == "triton"
    environment(DBCACHE_KERNELS="triton", TRITON_INTERPRET="1")
    assert select("auto", CPU) == "triton"
    assert select("reference", CPU) == "reference"


def test_the_environment_is_read_once(environment, monkeypatch):
    assert select("auto", CPU) == "reference"
    monkeypatch.setenv("DBCACHE_KERNELS", "nonsense")
    assert select("auto", CPU) == "reference"


def test_unknown_names_are_errors_that_list_the_known_ones(environment):
    with pytest.raises(ValueError, match=r"'auto', 'triton', 'reference'.*got 'cuda'"):
        select("cuda", CPU)
    environment(DBCACHE_KERNELS="cuda")
    with pytest.raises(ValueError, match=r"DBCACHE_KERNELS .*'triton', 'reference'.*got 'cuda'"):
        select("auto", CPU)
