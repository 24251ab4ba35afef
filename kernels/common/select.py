"""Which implementation of an op runs: Triton or the plain PyTorch reference."""

import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "reference"]
Backend = Literal["triton", "reference"]

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def select(impl: str, x: Tensor) -> Backend:
    """Resolve `impl` for a call on `x`.

    ``"auto"`` takes Triton for tensors on a GPU (CUDA or ROCm) and the reference for others, unless
    the environment variable ``DBCACHE_KERNELS`` names one. A name never falls back: ``"triton"``
    on the CPU needs Triton's interpreter, ``TRITON_INTERPRET=1``.

    The environment is read once, at the first call; `reset_environment` forgets it.

    Raises:
        ValueError: `impl` or ``DBCACHE_KERNELS`` is unknown, or Triton cannot run on `x`.
    """
    override, interpreted = _environment()
    if impl == "auto":
        impl = override or ("triton" if x.is_cuda else "reference")
    elif impl not in get_args(Impl):
        raise ValueError(f"select: impl must be one of {get_args(Impl)}, got {impl!r}")
    if impl == "triton" and not (x.is_cuda or interpreted):
        raise ValueError(
            f"select: impl='triton' needs a tensor on a GPU or TRITON_INTERPRET=1, got {x.device}"
        )
    return impl  # type: ignore[return-value]


def is_traced(x: Tensor) -> bool:
    """Whether the call on `x` must go through the registered op, so that a tracer sees it.

    True while torch.compile or torch.export traces, and for tensor subclasses such as fake tensors.
    Plain tensors skip the op, whose dispatch costs 10 to 20 us of host time per call.
    """
    return torch.compiler.is_compiling() or type(x) is not Tensor


def without_gradient(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate `function` to record no gradient.

    As `torch.no_grad`, but entered only where gradients are on: entering costs as much as a small
    op, and pipelines run without gradients already.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


_at_reset: list[Callable[[], None]] = []


def on_reset(forget: Callable[[], None]) -> None:
    """Have `forget` called whenever the environment or the tuned choices may have changed."""
    _at_reset.append(forget)


def reset_environment() -> None:
    """Read the environment again at the next call of `select`, and forget what followed from it."""
    _environment.cache_clear()
    forget_plans()


def forget_plans() -> None:
    """Forget how kernels were launched; see `plans`."""
    for forget in _at_reset:
        forget()


def invalid(op: str, must: str, *got: Any) -> ValueError:
    """Return a ValueError that says ``op: must, got ...``, with all offending values."""
    return ValueError(f"{op}: {must}, got {' and '.join(map(str, got))}")


@cache
def _environment() -> tuple[Backend | None, bool]:
    override = os.environ.get("DBCACHE_KERNELS") or None
    if override not in (None, *get_args(Backend)):
        allowed = get_args(Backend)
        raise ValueError(f"DBCACHE_KERNELS must be unset or one of {allowed}, got {override!r}")
    return cast("Backend | None", override), os.environ.get("TRITON_INTERPRET") == "1"
