"""Launches that were taken before: past checks and dispatch.

The first call of an op with some tensors checks them, chooses a grid, and goes through Triton,
which specialises each argument anew on each launch: most of a call's time on the host. What came of
that is a `Plan`: the compiled variant of the kernel, its grid and numbers, and the addresses of the
tensors that a lane keeps. The next call with these very tensors, and others of the same shapes,
dtypes and devices, launches the variant with the addresses of those others.

So it does only where this is the same as going through Triton: all addresses are multiples of 16,
as they were at first, and nobody listens to Triton's launches.

Where the reference runs, what is kept is that the tensors fit: then it is called past the checks.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from dbcache.kernels.common import select
from dbcache.kernels.common.select import is_traced

KNOWN = ((3, 5), (3, 10))
"""Versions of Triton, from and below, whose compiled kernels take the arguments given here."""
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_hooks = triton.knobs.runtime
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)


_Tensors = Sequence[Tensor | None]


class Plan:
    """How a kernel was launched for tensors of one layout, some of which a lane keeps.

    Attributes:
        serves: names of `impl` that lead here.
        kept: references to those.
        forms: shape, dtype and device of the others, None for one that is missing.
        tail: the last arguments, which do not change.
    """

    __slots__ = (
        "device", "forms", "grid", "kept", "kernel", "run", "scratch", "serves", "stream_of",
        "tail",
    )  # fmt: skip

    serves: tuple[str, ...]
    forms: list[tuple[Any, ...] | None]
    kept: list[Any]

    def __init__(
        self, variant: Any, device: int, grid: Sequence[int], tail: Sequence[Any], scratch: Any
    ) -> None:
        self.run = variant.run
        self.kernel = variant.function, variant.packed_metadata, None, None, None
        self.device = device
        self.grid = (*grid, 1, 1)[:3]
        self.stream_of = triton.runtime.driver.active.get_current_stream
        self.tail = tail
        self.scratch = scratch

    def launch(self, *args: int | None) -> None:
        """Launch the kernel with the addresses that change, None for a tensor that is missing."""
        self.run(*self.grid, self.stream_of(self.device), *self.kernel, *args, *self.tail)


class Checked:
    """Tensors of one layout that an op checked for its reference; see `Plan`."""

    __slots__ = ("forms", "kept")

    kept: list[Any]

    def __init__(self, moving: _Tensors) -> None:
        self.forms = [None if x is None else (x.shape, x.dtype, x.device) for x in moving]

    def fits(self, moving: _Tensors) -> bool:
        """Whether other tensors are of the same layout."""
        for x, form in zip(moving, self.forms, strict=True):
            if type(x) is Tensor:
                if (x.shape, x.dtype, x.device) != form:
                    return False
            elif x is not None or form is not None:
                return False
        return True


REFERENCE: Any = object()
"""Stands for a plan where the reference runs on tensors that were checked before."""


class Plans(dict[Hashable, Plan | Checked]):
    """The plans of one op, by flags and the identities of the tensors that are kept."""

    def __init__(self) -> None:
        super().__init__()
        select.on_reset(self.clear)

    def _keep(self, flags: Hashable, kept: _Tensors, plan: Plan | Checked) -> None:
        """Add a plan, until one of its tensors ends."""
        key = (flags, *map(id, kept))
        plan.kept = [weakref.ref(x, lambda _: self.pop(key, None)) for x in kept if x is not None]
        self[key] = plan

    def note_checked(self, impl: str, flags: Hashable, moving: _Tensors, kept: _Tensors) -> Any:
        """Note that the tensors of a call fit, and return `REFERENCE`, if the reference runs.

        Arguments as of `find`. None where Triton runs, or something traces the call.
        """
        given = [x for x in (*moving, *kept) if x is not None]
        if any(map(is_traced, given)) or select.select(impl, given[0]) != "reference":
            return None
        if impl == "auto":
            self._keep(flags, kept, Checked(moving))
        return REFERENCE

    def find(
        self, impl: str, flags: Hashable, moving: _Tensors, kept: _Tensors = ()
    ) -> tuple[Plan, list[int | None]] | None:
        """Return the plan for these tensors, and the addresses of those that are `moving`.

        `REFERENCE` where the reference is to run on them, which fit. None where Triton must look at
        the tensors: there is no plan yet, an address is not a multiple of 16, another device is the
        current one, or somebody listens to launches; and where something traces the call.

        Args:
            impl: as of `select`.
            flags: what a plan holds for; without `kept`, with the shapes that come in turns.
            moving: tensors that may be others at each call, None for one that is missing.
            kept: tensors of a lane, None for one that is missing, but not the first. They are known
                by identity: their memory and shape do not change. A plan ends with any of them.
        """
        first: Any = kept[0] if kept else moving[0]
        plan = None if is_traced(first) else self.get((flags, *map(id, kept)))
        if type(plan) is not Plan:
            is_checked = plan is not None and impl == "auto" and plan.fits(moving)  # type: ignore[union-attr]
            return REFERENCE if is_checked else None
        if impl not in plan.serves or plan.device != _current_device():
            return None
        if _hooks.launch_enter_hook.calls:
            return None
        bits = 0
        addresses: list[int | None] = []
        for x, form in zip(moving, plan.forms):  # noqa: B905 (as many, and `strict` takes time)
            if type(x) is Tensor and (x.dtype, x.shape, x.get_device()) == form:
                address = x.data_ptr()
                bits |= address if x.is_contiguous() else 1
                addresses.append(address)
            elif x is None and form is None:
                addresses.append(None)
            else:
                return None
        return None if bits & 15 else (plan, addresses)

    def launch(
        self,
        flags: Hashable,
        moving: _Tensors,
        kept: _Tensors,
        kernel: Any,
        grid: tuple[int, ...],
        args: Sequence[Any],
        fixed: Sequence[Any],
        tail: dict[str, Any],
        scratch: Tensor | None = None,
        **options: Any,
    ) -> None:
        """Launch `kernel` through Triton, and keep the plan if later launches can follow it.

        Args:
            flags: as of `find`, like the next two.
            moving: those that the op was called with.
            kept: likewise.
            kernel: takes `args`, `fixed` and `tail`, in this order.
            grid: number of programs.
            args: contiguous tensors that differ from call to call, None for one that is missing.
            fixed: those of `kept`, and numbers that Triton does not specialise.
            tail: numbers and constexprs that follow from the layout, by name, in order.
            scratch: a tensor like the one that each launch needs for itself.
            options: of Triton, such as `num_warps`.
        """
        variant = kernel[grid](*args, *fixed, **tail, **options)
        is_known = KNOWN[0] <= _VERSION < KNOWN[1] and isinstance(kernel, triton.JITFunction)
        given = [x for x in (*moving, *kept, *args, *fixed) if isinstance(x, Tensor)]
        is_plain = all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in given)
        if not (is_known and is_plain) or kernel.pre_run_hooks:
            return
        last = [x.data_ptr() if isinstance(x, Tensor) else x for x in fixed]
        plan = Plan(variant, given[0].get_device(), grid, (*last, *tail.values()), scratch)
        plan.forms = [None if x is None else (x.dtype, x.shape, x.get_device()) for x in moving]
        is_default = select.select("auto", given[0]) == "triton"
        plan.serves = ("auto", "triton") if is_default else ("triton",)
        self._keep(flags, kept, plan)
