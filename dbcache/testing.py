"""Helpers for tests of numerical code, used by this project's own tests."""

import torch
from torch import Tensor


def assert_as_accurate(
    actual: Tensor, plain: Tensor, exact: Tensor, *, factor: float = 2.0, tiny: float = 1e-6
) -> None:
    """Assert that `actual` is about as close to the truth as plain PyTorch is.

        max|actual - exact| <= factor * max|plain - exact| + tiny * max|exact|

    So the bound follows from the dtype and the size of the problem, and none is made up.

    Args:
        actual: what is tested, any dtype.
        plain: the same by plain PyTorch operations in the dtype of `actual`.
        exact: the same in float64.
        factor: how many times the error of `plain` is allowed.
        tiny: relative slack, for when `plain` happens to be exact.
    """
    if not actual.shape == plain.shape == exact.shape:
        shapes = tuple(tuple(x.shape) for x in (actual, plain, exact))
        raise AssertionError(f"the shapes differ: {shapes}")
    if actual.numel() == 0:
        return
    error = _largest_difference(actual, exact)
    allowed = factor * _largest_difference(plain, exact) + tiny * float(exact.abs().max())
    # negated, so that a NaN on either side fails
    if not error <= allowed:
        raise AssertionError(f"the largest error is {error:.3e}, allowed are {allowed:.3e}")


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return a tensor of NaN, to stand for memory that must be written before it is read."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def _largest_difference(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).abs().max())
