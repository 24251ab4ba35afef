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
from torch import Tensor

from dbcache.kernels.common import select

KNOWN = ((3, 5), (3, 10))
"""Versions of Triton, from and below, whose compiled kernels take the arguments given here."""
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_is_compiling = torch.compiler.is_compiling
_hooks = triton.knobs.runtime
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
        scratch: Any,
    ) -> None:
        self.run, self.function = variant.run, variant.function
        self.metadata = variant.packed_metadata
        self.device = device
        self.grid = (*grid, 1, 1)[:3]
        self.stream_of = triton.runtime.driver.active.get_current_stream
        self.count = count
        self.tail = tail
        self.scratch = scratch

    def launch(self, *args: int | None) -> None:
        """Launch the kernel with the addresses of its tensors, None for one that is missing.

        Those at the end that are missing need not be named.
        """
        if len(args) < self.count:
            args += (None,) * (self.count - len(args))
        stream = self.stream_of(self.device)
        self.run(
            *self.grid, stream, self.function, self.metadata, None, None, None, *args, *self.tail
        )


class Plans(dict[Hashable, Plan]):
    """The plans of one op, by layout."""

    def __init__(self) -> None:
        super().__init__()
        select.on_reset(self.clear)

    def find(
        self, impl: str, flags: Hashable, tensors: Sequence[Tensor | None]
    ) -> tuple[Plan, list[int | None]] | None:
        """Return the plan for tensors of this layout, and their addresses.

        None where Triton must look at the tensors: there is no plan yet, an address is not a
        multiple of 16, another device is the current one, or somebody listens to launches; and
        where no kernel runs, or something traces the call. The first tensor is never None.
        """
        first = tensors[0]
        if not self or type(first) is not Tensor or _is_compiling():
            return None
        addresses: list[int | None] = []
        layout: list[Hashable] = [flags]
        bits = 0
        for x in tensors:
            if x is None:
                addresses.append(None)
                layout.append(None)
            else:
                address = x.data_ptr()
                addresses.append(address)
                bits |= address
                layout += (x.shape, x.dtype, x.is_contiguous(), x.get_device())
        plan = self.get(tuple(layout))
        if plan is None or bits & 15 or plan.device != _current_device():
            return None
        if _hooks.launch_enter_hook.calls or select.select(impl, first) != "triton":
            return None
        return plan, addresses

    def launch(
        self,
        flags: Hashable,
        tensors: Sequence[Tensor | None],
        kernel: Any,
        grid: tuple[int, ...],
        args: Sequence[Any],
        tail: dict[str, Any],
        scratch: Tensor | None = None,
        **options: Any,
    ) -> None:
        """Launch `kernel` through Triton, and keep the plan if later launches can follow it.

        Args:
            flags: as of `find`.
            tensors: as of `find`: those that the op was called with.
            kernel: takes `args` and `tail`, in this order.
            grid: number of programs.
            args: contiguous tensors, None for one that is missing, and numbers that Triton does not
                specialise: what changes from call to call.
            tail: numbers and constexprs that follow from the layout, by name, in order.
            scratch: a tensor like the one that each launch needs for itself.
            options: of Triton, such as `num_warps`.
        """
        variant = kernel[grid](*args, **tail, **options)
        is_known = KNOWN[0] <= _VERSION < KNOWN[1] and isinstance(kernel, triton.JITFunction)
        given = [x for x in (*tensors, *args) if isinstance(x, Tensor)]
        is_plain = all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in given)
        if is_known and is_plain and not kernel.pre_run_hooks:
            rest = (len(args), tuple(tail.values()), scratch)
            self[_layout_of(flags, tensors)] = Plan(variant, given[0].get_device(), grid, *rest)


def _layout_of(flags: Hashable, tensors: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    """Return what `Plans.find` looks for: all but the addresses that checks and launches read."""
    layout: list[Hashable] = [flags]
    for x in tensors:
        layout += (None,) if x is None else (x.shape, x.dtype, x.is_contiguous(), x.get_device())
    return tuple(layout)
