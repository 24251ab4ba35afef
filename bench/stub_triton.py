"""Triton on a machine without a GPU: everything but compilation and the launch itself runs.

Kernels are dispatched as for an sm_90 GPU, on CPU tensors: arguments are bound and specialised,
variants are looked up. A variant that is new is counted instead of compiled, and a launch does
nothing. So what is timed is the host's share of a launch, and what is counted is what would be
compiled. Results of the ops are not computed.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dbcache.kernels.common import plans, select


class Driver:
    """What `triton.runtime.driver.active` is on a GPU, as far as a launch asks."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Variant:
    """A compiled variant of a kernel that does nothing."""

    function = 0
    packed_metadata = ()

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def stubbed_launches() -> Iterator[Counter[str]]:
    """Let ``impl="triton"`` run on CPU tensors; yield the variants of each kernel by its name."""
    variants: Counter[str] = Counter()

    def compiled(kernel: JITFunction, key: Any, signature: Any, device: int, *rest: Any) -> Variant:
        variants[kernel.__name__] += 1
        return kernel.device_caches[device][0].setdefault(key, Variant())

    own_compile, own_environment = JITFunction._do_compile, select._environment
    own_driver, own_device = triton.runtime.driver._active, plans._current_device
    triton.runtime.driver.set_active(Driver())
    JITFunction._do_compile = compiled
    select._environment = lambda: ("triton", True)
    plans._current_device = lambda: -1
    try:
        yield variants
    finally:
        JITFunction._do_compile, select._environment = own_compile, own_environment
        triton.runtime.driver._active, plans._current_device = own_driver, own_device
        select.forget_plans()
