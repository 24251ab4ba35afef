"""Checks of an op's tensors. Each raises a ValueError that says ``op: what must hold, got ...``."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dbcache.kernels.common.select import DTYPES, invalid

_SHARED = {
    "shape": "share a shape",
    "dtype": f"share a dtype of {DTYPES}",
    "device": "be on one device",
}


def check_shared(
    op: str, what: Literal["shape", "dtype", "device"], /, **tensors: Tensor | None
) -> None:
    """Raise unless the tensors, by name, are alike; None stands for one that is missing."""
    given = {name: getattr(x, what) for name, x in tensors.items() if x is not None}
    first, *others = given.values()
    if any(x != first for x in others) or (what == "dtype" and first not in DTYPES):
        *names, last = given
        must = f"{', '.join(names)} and {last} must {_SHARED[what]}"
        if not names:
            must = f"{last} must have a dtype of {DTYPES}"
        got = map(tuple, given.values()) if what == "shape" else given.values()
        raise invalid(op, must, *got)


def check_activations(op: str, p_ref: Tensor | None = None, **activations: Tensor | None) -> None:
    """Raise unless the activations, by name, are alike, and `p_ref` has their shape and device."""
    check_shared(op, "shape", **activations, p_ref=p_ref)
    check_shared(op, "dtype", **activations)
    check_shared(op, "device", **activations, p_ref=p_ref)
    if p_ref is not None and p_ref.dtype not in DTYPES:
        raise invalid(op, f"p_ref must have a dtype of {DTYPES}", p_ref.dtype)


def check_tensor(
    op: str,
    name: str,
    x: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    device: torch.device | None = None,
    *,
    contiguous: bool = False,
) -> None:
    """Raise unless `x` has this dtype and shape; on `device` and contiguous, where that is said."""
    is_like = x.dtype == dtype and x.shape == tuple(shape)
    if not is_like or (device or x.device) != x.device or (contiguous and not x.is_contiguous()):
        must = f"{'contiguous ' * contiguous}{str(dtype).removeprefix('torch.')} {tuple(shape)}"
        where = "" if device is None else f" on {device}"
        got = (x.dtype, tuple(x.shape), *[x.stride()] * contiguous, x.device)
        raise invalid(op, f"{name} must be {must}{where}", *got)
