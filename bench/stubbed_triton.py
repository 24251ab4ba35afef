"""Triton on a CPU without compilation and launches: what remains of an op is its time on the host.

    with stubbed_triton() as launches:
        probe_and_decide(h_in, h_fn, p_ref, state)

Kernels are dispatched as for an sm_90 GPU, on CPU tensors. All that a launch costs in Python is
there: the op's checks, its grid, binding and specialising of arguments, the look-up of the variant.
A variant that is new is counted instead of compiled; Triton's launcher in C and the driver are left
out. Outputs stay as they were allocated. The one thing that a launch does is that kernels which
decide write the decision that is asked for, as the host goes by it.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dbcache.kernels.by_row.table import COLUMNS
from dbcache.kernels.common import plans, select
from dbcache.kernels.common.lane_state import CACHED

ARGUMENTS_FROM = 9
"""What Triton hands to a launcher before the kernel's own arguments: grid, stream, function, ..."""


class Launches:
    """What was launched, and what the next decision is to be.

    Attributes:
        counts: launches of each kernel, by its name.
        variants: variants of each kernel that would have been compiled.
        cached: what kernels that decide write.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.variants: Counter[str] = Counter()
        self.cached = False


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


class CountedVariant(Variant):
    """A variant whose launches are counted, and which decides as it is told to."""

    def __init__(self, kernel: JITFunction, launches: Launches) -> None:
        names = list(kernel.arg_names)
        self.name = kernel.__name__
        self.launches = launches
        told = [name for name in ("counters_ptr", "table_ptr") if name in names]
        self.decides = "decide" in self.name and bool(told)
        self.by_row = told == ["table_ptr"]
        self.counters_at = ARGUMENTS_FROM + names.index(told[0]) if told else 0
        self.names = names
        self.flags: dict[Any, Any] = {}

    def run(self, *args: Any) -> None:  # few instructions, as they count as the op's
        self.launches.counts[self.name] += 1
        if not self.decides:
            return
        if not self.by_row:
            counters = args[self.counters_at]
            flag = self.flags.get(counters)
            if flag is None:
                flag = self.flags[counters] = _flag_at(_at(counters))
            flag.value = self.launches.cached
            return
        named = dict(zip(self.names, args[ARGUMENTS_FROM:], strict=False))
        for address in self._flags(named, *args[:2]):
            _flag_at(address).value = self.launches.cached

    @staticmethod
    def _flags(named: dict[str, Any], programs: int, rows: int) -> list[int]:
        """Return where `decide_rows` leaves decisions: in each lane, and for the host."""
        lines = (ctypes.c_int64 * (COLUMNS * rows)).from_address(_at(named["table_ptr"], 0))
        found = [line + 4 * CACHED for line in lines[::COLUMNS] if line]
        if named["partials_ptr"] is not None:
            start = _at(named["partials_ptr"], 4 * rows * programs * named["WIDTH"])
            found += [start + 4 * row for row in range(rows)]
        return found


_flag_at = ctypes.c_int32.from_address


def _at(x: Any, offset: int = 4 * CACHED) -> int:
    """Return the address `offset` bytes behind the start of a tensor, or of an address."""
    return int(x if isinstance(x, int) else x.data_ptr()) + offset


@contextmanager
def stubbed_triton(*, counted: bool = True) -> Iterator[Launches]:
    """Let the ops take their Triton path for tensors on the CPU, with launches that do nothing.

    Args:
        counted: False: launches are neither counted nor do they decide, which takes no time.

    Raises:
        RuntimeError: the process interprets Triton's kernels.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        must = "TRITON_INTERPRET must be unset before Triton is imported"
        raise RuntimeError(f"stubbed_triton: {must}, got 1")
    launches, made = Launches(), []

    def compiled(kernel: JITFunction, key: Any, signature: Any, device: int, *rest: Any) -> Variant:
        launches.variants[kernel.__name__] += 1
        variant = CountedVariant(kernel, launches) if counted else Variant()
        known = kernel.device_caches[device][0]
        made.append((known, key))
        return known.setdefault(key, variant)

    own_compile, own_environment = JITFunction._do_compile, select._environment
    own_driver, own_device = triton.runtime.driver._active, plans._current_device
    triton.runtime.driver.set_active(Driver())
    JITFunction._do_compile = compiled
    select._environment = cache(lambda: ("triton", True))
    plans._current_device = lambda: -1
    select.forget_plans()
    try:
        yield launches
    finally:
        JITFunction._do_compile, select._environment = own_compile, own_environment
        triton.runtime.driver._active, plans._current_device = own_driver, own_device
        select.forget_plans()
        for known, key in made:
            known.pop(key, None)
