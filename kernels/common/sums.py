"""Sums in a fixed order, and the relative L1 of them, in Python and as Triton functions.

A sum in float32 depends on its order, and `tl.sum` takes the one that fits the layout of its
registers: another number of warps, another result. Here neighbours are added until one is left,

    ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))

so the result follows from the values alone: the same bits on every GPU, with every configuration,
and on the host.
"""

from collections.abc import Sequence
from ctypes import c_float
from math import inf, nan
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.launches import BLOCK, cdiv
from dbcache.kernels.common.select import invalid

MAX_PARTIALS = 896
"""Most partial sums per sample: one program of `decide` adds them up.

Seven programs of a probe fit on one of the 132 multiprocessors of an H100 or H200, so 896 programs
run at once; of 1024, the last ones would run alone, after the others.
"""
MAX_LANES = 1024
"""The power of 2 from MAX_PARTIALS on."""


def partition(shape: torch.Size, by_token: bool) -> tuple[int, int]:
    """Return (blocks or tokens per program, programs per sample), from the shape alone."""
    return _share(shape[1:-1].numel()) if by_token else partition_of(shape[1:].numel())


def partition_of(numel: int) -> tuple[int, int]:
    """Return (blocks of elements per program, programs) for sums over `numel` elements."""
    return _share(cdiv(numel, BLOCK))


def _share(parts: int) -> tuple[int, int]:
    """Return (parts per program, programs), both at least 1, of at most MAX_PARTIALS programs."""
    parts = max(1, parts)
    per_program = cdiv(parts, MAX_PARTIALS)
    return per_program, cdiv(parts, per_program)


def lanes_for(programs: int) -> tuple[int, int]:
    """Return LOG_LANES and warps of a kernel that adds up `programs` partial sums.

    One of two pairs: a kernel is not compiled anew for each resolution. Lanes beyond `programs` are
    zeros, which change no sum.
    """
    return (7, 1) if programs <= 128 else (log2(MAX_LANES), 4)


def check_partials(
    op: str, x: Tensor, device: torch.device, widths: Sequence[int] = (2,), blocks: int = 0
) -> None:
    """Raise unless `x` are float32 partial sums (B, T, a width) on `device`, or those of blocks."""
    first = (blocks,) if blocks else ()
    fits = x.ndim == 3 + len(first) and x.shape[:-3] == first and x.shape[-1] in widths
    if not fits or x.shape[-2] > MAX_PARTIALS:
        form = ", ".join(map(str, (*first, "B", "T", " or ".join(map(str, widths)))))
        raise invalid(op, f"partials must be ({form}) with T <= {MAX_PARTIALS}", tuple(x.shape))
    if x.dtype != torch.float32 or x.device != device:
        raise invalid(op, f"partials must be float32 on {device}", x.dtype, x.device)


def log2(power: int) -> int:
    """Return the exponent of a power of 2."""
    return power.bit_length() - 1


def relative_l1(partials: Sequence[Sequence[Sequence[float]]], worst: bool = False) -> float:
    """Return the relative L1 of the batch from partial sums, nested lists (B, T, 2 or 4).

    Args:
        partials: T partial sums (num, den) for each of B samples, of all tokens and, where there
            are four, of the important ones. Those alone count, if any changed.
        worst: False: all num over all den, the samples one after another. True: the largest num /
            den of a sample, NaN if one is NaN.
    """
    if worst:
        ratios = [_ratio(sums) for sums in _sums_of_samples(partials)]
        return next((ratio for ratio in ratios if ratio != ratio), max(ratios))
    return _ratio(total_sums(partials))


def total_sums(partials: Sequence[Sequence[Sequence[float]]]) -> Sequence[float]:
    """Return the sums of the batch, one sample after another, from nested lists (B, T, width)."""
    samples = _sums_of_samples(partials)
    total = samples[0]
    for sums in samples[1:]:
        total = [f32(a + b) for a, b in zip(total, sums, strict=True)]
    return total


def _sums_of_samples(partials: Sequence[Sequence[Sequence[float]]]) -> list[Sequence[float]]:
    """Return the sums of each sample, from nested lists (B, T, width)."""
    if len(partials[0]) == 1:
        return [sample[0] for sample in partials]
    return [[tree_sum(column) for column in zip(*sample, strict=True)] for sample in partials]


def _ratio(sums: Sequence[float]) -> float:
    num, den = sums[-2:] if sums[-2] != 0 else sums[:2]
    return divide(num, den)


def divide(num: float, den: float) -> float:
    """Return the float32 quotient of numbers that are not negative."""
    if den == 0:
        return nan if num == 0 or num != num else inf
    return f32(num / den)


def f32(x: float) -> float:
    """Round to float32. One operation in float64, then this, is that operation in float32."""
    return c_float(x).value


def tree_sum(x: Sequence[float]) -> float:
    """Add neighbours, then neighbouring sums, and so on."""
    while len(x) > 1:
        odd = x[-1:] if len(x) % 2 else ()
        x = [*(f32(a + b) for a, b in zip(x[::2], x[1::2], strict=False)), *odd]
    return x[0]


class Partials(NamedTuple):
    """Partial sums in memory, (samples, programs, width), in a kernel."""

    ptr: Any
    samples: Any
    programs: Any


@triton.jit
def relative_l1_of_partials(partials, LOG_LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The function `relative_l1` above, for at most 2**LOG_LANES programs, of WIDTH sums each.

    Returns it for the batch as a whole and for the worst sample, and the batch's num and den of all
    tokens, the first two of `total_sums` above.
    """
    num = tl.full((), 0.0, tl.float32)
    den, important_num, important_den, largest = num, num, num, num
    for sample in range(partials.samples):
        sums_ptr = partials.ptr + sample * partials.programs * WIDTH
        sums = sums_of_columns(sums_ptr, partials.programs, LOG_LANES, WIDTH)
        if WIDTH == 4:
            nums, dens = tl.split(tl.reshape(sums, (2, 2)))
            sample_num, some_num = tl.split(nums)
            sample_den, some_den = tl.split(dens)
        else:
            sample_num, sample_den = tl.split(sums)
        num += sample_num
        den += sample_den
        if WIDTH == 4:
            important_num += some_num
            important_den += some_den
            sample_den = tl.where(some_num != 0, some_den, sample_den)
            sample_num = tl.where(some_num != 0, some_num, sample_num)
        ratio = tl.div_rn(sample_num, sample_den)
        # once NaN, it stays NaN: no comparison with NaN is true
        largest = tl.where((ratio > largest) | (ratio != ratio), ratio, largest)
    moved, size = num, den
    if WIDTH == 4:
        den = tl.where(important_num != 0, important_den, den)
        num = tl.where(important_num != 0, important_num, num)
    return tl.div_rn(num, den), largest, moved, size


@triton.jit
def sums_of_columns(sums_ptr, programs, LOG_LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The function `tree_sum` above, of the columns of (programs, WIDTH) numbers, in one tile."""
    lane, column = tl.arange(0, 1 << LOG_LANES), tl.arange(0, WIDTH)
    offsets = lane[:, None] * WIDTH + column[None, :]
    x = tl.load(sums_ptr + offsets, mask=(lane < programs)[:, None], other=0.0)
    return _tree_sum_tile(x, LOG_LANES, WIDTH)


@triton.jit
def _tree_sum_tile(x, LOG_LANES: tl.constexpr, WIDTH: tl.constexpr):
    for level in tl.static_range(1, LOG_LANES + 1):
        x = tl.sum(tl.reshape(x, ((1 << LOG_LANES) >> level, 2, WIDTH)), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def tree_sums_of_two(x, y, LOG_LANES: tl.constexpr):
    """The function `tree_sum` above, of each of two vectors of 2**LOG_LANES lanes."""
    return tl.split(_tree_sum_tile(tl.join(x, y), LOG_LANES, 2))


@triton.jit
def sum_of_column(column_ptr, programs, LOG_LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The function `tree_sum` above, of every WIDTH-th number: at most 2**LOG_LANES of them."""
    lane = tl.arange(0, 1 << LOG_LANES)
    x = tl.load(column_ptr + lane * WIDTH, mask=lane < programs, other=0.0)
    return tree_sum_lanes(x, LOG_LANES)


@triton.jit
def tree_sum_lanes(x, LOG_LANES: tl.constexpr):
    """The function `tree_sum` above, of 2**LOG_LANES lanes."""
    for level in tl.static_range(1, LOG_LANES + 1):
        x = tl.sum(tl.reshape(x, ((1 << LOG_LANES) >> level, 2)), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def lanes_of(program, per_program, i, LOG_BLOCK: tl.constexpr):
    """Return the elements of a sample in block i of a program: 64 bits, for long videos."""
    start = (program.to(tl.int64) * per_program + i) << LOG_BLOCK
    return start + tl.arange(0, 1 << LOG_BLOCK)
