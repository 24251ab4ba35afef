"""Triton on a CPU whose launches do nothing: what remains of an op is its time on the host.

    with stubbed_triton() as launches:     # before the first launch in the process
        probe_and_decide(h_in, h_fn, p_ref, state)

All that a launch costs in Python is there: the op's checks, its grid, the look-up or compilation of
the kernel (for sm_90, as on a GPU), the handing over of arguments. What is left out is Triton's
launcher in C, and the driver. Outputs stay as they were allocated. The one thing that a launch does
is that kernels which decide write the decision that is asked for, as the host goes by it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from dbcache import kernels
from dbcache.kernels.common.lane_state import CACHED
from dbcache.kernels.common.select import reset_environment, select

CAPABILITY = 90
ARGUMENTS_FROM = 9
"""What Triton hands to a launcher before the kernel's own arguments: grid, stream, function, ..."""
OVERRIDE, INTERPRET = "DBCACHE_KERNELS", "TRITON_INTERPRET"


class Launches:
    """What was launched, and what the next decision is to be."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.cached = False


class _Launcher:
    """Stands in for the launcher of one compiled kernel."""

    def __init__(self, source: Any, launches: Launches) -> None:
        names = list(source.fn.arg_names)
        self.name = source.fn.__name__
        self.launches = launches
        self.decides = "decide" in self.name and "counters_ptr" in names
        self.place = ARGUMENTS_FROM + names.index("counters_ptr") if self.decides else 0

    def __call__(self, *arguments: Any) -> None:
        self.launches.counts[self.name] += 1
        if self.decides:
            counters = arguments[self.place]
            address = counters if isinstance(counters, int) else counters.data_ptr()
            flag = ctypes.c_int32.from_address(address + 4 * CACHED)
            flag.value = self.launches.cached


class _Driver(DriverBase):
    """An sm_90 that is not there."""

    def __init__(self, launches: Launches) -> None:
        self.launcher_cls = lambda source, metadata: _Launcher(source, launches)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda name, binary, shared, device: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("there is nothing to time on a device")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def stubbed_triton() -> Iterator[Launches]:
    """Let the ops take their Triton path for tensors on the CPU, with launches that do nothing.

    Raises:
        RuntimeError: the process interprets Triton's kernels.
    """
    if os.environ.get(INTERPRET) == "1":
        raise RuntimeError(
            f"stubbed_triton: {INTERPRET} must be unset before Triton is imported, got 1"
        )
    for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        importlib.import_module(info.name)  # kernels are interpreted or not from their import on
    launches, before, active = Launches(), os.environ.get(OVERRIDE), driver._active
    os.environ |= {OVERRIDE: "triton", INTERPRET: "1"}  # for `select`, which reads them once
    try:
        reset_environment()
        select("auto", torch.empty(0))
        del os.environ[INTERPRET]
        driver.set_active(_Driver(launches))
        yield launches
    finally:
        os.environ.pop(INTERPRET, None)
        os.environ.pop(OVERRIDE)
        if before is not None:
            os.environ[OVERRIDE] = before
        reset_environment()
        driver._active = active
