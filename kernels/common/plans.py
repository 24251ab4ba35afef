"""Launches that were taken before, by the layout of their tensors: past checks and dispatch.

The first call of an op with tensors of some shapes, dtypes and devices checks them, chooses a grid,
and goes through Triton, which specialises each argument anew on each launch: most of a call's time
on the host. What came of that is a `Plan`: the compiled variant of the kernel, its grid and its
numbers. The next call with tensors of that layout launches the variant with their addresses.

So it does only where this is the same as going through Triton: all addresses are multiples of 16,
as they were at first, and nobody listens to Triton's launches.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton

from dbcache.kernels.common import select

KNOWN = ((3, 5), (3, 10))
"""Versions of Triton, from and below, whose compiled kernels take the arguments given here."""
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)


class Plan:
    """How a kernel was launched for tensors of one layout."""

    __slots__ = (
        "count",
        "device",
        "function",
        "grid",
        "metadata",
        "run",
        "scratch",
        "stream_of",
        "tail",
    )

    def __init__(
        self,
        variant: Any,
        device: int,
        grid: Sequence[int],
        count: int,
        tail: Sequence[Any],
        scratch: tuple[int, ...],
    ) -> None:
        self.run, self.function = variant.run, variant.function
        self.metadata = variant.packed_metadata
        self.device = device
        self.grid = (*grid, 1, 1)[:3]
        self.stream_of = triton.runtime.driver.active.get_current_stream
        self.count = count
        self.tail = tail
        self.scratch = scratch

    def launch(self, tensors: Sequence[torch.Tensor | None], numbers: Sequence[int] = ()) -> bool:
        """Launch the kernel, or return False where Triton must look at the tensors again.

        `tensors` may lack those at the end that are None.
        """
        addresses: list[int | None] = []
        bits = 0
        for x in tensors:
            if x is None:
                addresses.append(None)
            else:
                address = x.data_ptr()
                addresses.append(address)
                bits |= address
        if bits & 15 or self.device != _current_device():
            return False
        if triton.knobs.runtime.launch_enter_hook.calls:
            return False
        missing = [None] * (self.count - len(addresses))
        self.run(
            *self.grid, self.stream_of(self.device), self.function, self.metadata,
            None, None, None, *addresses, *missing, *numbers, *self.tail,
        )  # fmt: skip
        return True


class Plans(dict[Hashable, Plan]):
    """The plans of one op, by layout."""

    def __init__(self) -> None:
        super().__init__()
        select.on_reset(self.clear)

    def launch(
        self,
        layout: Hashable,
        kernel: Any,
        grid: tuple[int, ...],
        tensors: Sequence[torch.Tensor | None],
        tail: dict[str, Any],
        numbers: Sequence[int] = (),
        scratch: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        """Launch `kernel` through Triton, and keep the plan if later launches can follow it.

        Args:
            layout: of what the op was called with.
            kernel: takes the tensors, the numbers, and `tail`, in this order.
            grid: number of programs.
            tensors: contiguous.
            tail: numbers and constexprs that follow from the layout, by name, in order.
            numbers: those that change from call to call, which Triton does not specialise.
            scratch: shape of a tensor that the launch needs for itself.
            options: of Triton, such as `num_warps`.
        """
        variant = kernel[grid](*tensors, *numbers, **tail, **options)
        is_known = KNOWN[0] <= _VERSION < KNOWN[1] and isinstance(kernel, triton.JITFunction)
        given = [x for x in tensors if x is not None]
        if is_known and not kernel.pre_run_hooks and not any(x.data_ptr() % 16 for x in given):
            rest = (len(tensors), tuple(tail.values()), scratch)
            self[layout] = Plan(variant, given[0].get_device(), grid, *rest)


def layout_of(tensors: Sequence[torch.Tensor | None]) -> tuple[Hashable, ...]:
    """Return all of tensors that checks and launches depend on, but their addresses."""
    layout: list[Hashable] = []
    for x in tensors:
        if x is not None:
            layout += (x.shape, x.dtype, x.is_contiguous(), x.get_device())
        else:
            layout.append(None)
    return tuple(layout)
