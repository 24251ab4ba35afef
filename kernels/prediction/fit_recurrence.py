"""The linear recurrence that the snapshots in the ring follow, fitted by least squares.

With Y_0 ... Y_{n-1} the newest snapshots that are equally far apart, newest first, and
D_m = Y_{m-1} - Y_m, the two numbers alpha and gamma minimise

    sum over i of |D_i - alpha D_{i+1} - gamma Y_i|^2 + ridge ((alpha - 1)^2 |D|^2 + gamma^2 |Y|^2)

over the n - 2 triples, |D|^2 and |Y|^2 summed over them. So Y_{i-1} is (1 + alpha + gamma) Y_i -
alpha Y_{i+1}: what dynamic mode decomposition of rank 2 finds, from the few entries of the
snapshots' Gram matrix that matter. Straight lines have (1, 0), and the ridge pulls towards them.
Products of differences are summed, which keeps the digits that tell (1, 0) from others.

One pass over the ring: n * numel * itemsize bytes read, so it is bound by memory bandwidth. The
same inputs give the same bits on every GPU and with every number of warps, as in `probe_diff`. The
program that finishes last solves the two equations, in float64.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.checks import check_shared, check_tensor
from dbcache.kernels.common.constants import Constants
from dbcache.kernels.common.lane_state import LANE, LaneState
from dbcache.kernels.common.launches import BLOCK
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import DTYPES, Impl, invalid, without_gradient
from dbcache.kernels.common.sums import (
    MAX_LANES,
    lanes_of,
    log2,
    partition_of,
    sum_of_column,
    tree_sum_lanes,
)

NUM_SUMS = 5
"""Of D_{i+1}^2, D_{i+1} Y_i, Y_i^2, D_i D_{i+1} and D_i Y_i."""

SINGULAR = 1e-10
"""Least determinant, of that of two independent directions, at which the equations are solved."""
FIT = Constants(globals())


def num_warps(itemsize: int) -> int:
    """Return the warps of a program, so that a thread loads 16 bytes per tensor at a time."""
    return 8 * itemsize // 2


def fit_recurrence(
    ring: Tensor, state: LaneState, fit: Tensor, *, ridge: float = 0.0, impl: Impl = "auto"
) -> None:
    """Write (alpha, gamma) of the snapshots in `ring` to `fit`; NaN where there is no fit.

    That is where fewer than three of the newest are equally far apart, do not differ, or are not
    finite.

    Args:
        ring: (K, ...) with K <= MAX_SLOTS, float32, float16 or bfloat16, contiguous.
        state: state of the lane on the same device, of the step that `commit` has just stored.
        fit: float64 (2,) on the same device, written.
        ridge: pull towards straight lines, at least 0.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the state on the host, which synchronises if it is on a GPU; Triton does
    not. The two differ in the order of additions, thus in the last bits.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if ring.dtype not in DTYPES or not ring.is_contiguous() or not 1 <= len(ring) <= ls.MAX_SLOTS:
        must = f"ring must be contiguous (K, ...) with K <= {ls.MAX_SLOTS} and a dtype of {DTYPES}"
        raise invalid("fit_recurrence", must, tuple(ring.shape), ring.dtype, ring.stride())
    check_tensor("fit_recurrence", "fit", fit, torch.float64, (2,))
    check_shared("fit_recurrence", "device", ring=ring, fit=fit, state=state.counters)
    if not ridge >= 0:
        raise invalid("fit_recurrence", "ridge must be at least 0", ridge)
    _fit_recurrence(impl, ring, state.counters, fit, ridge)


@without_gradient
def fit_recurrence_reference(ring: Tensor, counters: Tensor, fit: Tensor, ridge: float) -> None:
    """Plain PyTorch, the meaning of `fit_recurrence`."""
    numbers = counters.tolist()
    slots, head = ring.shape[0], numbers[ls.HEAD]
    steps = ls.steps_newest_first(numbers, slots)
    y = [ring[(head - 1 - m) % slots].double().flatten() for m in range(equally_spaced(steps))]
    d = [newer - older for newer, older in pairwise(y)]
    sums = [0.0] * NUM_SUMS
    for (newer, older), level in zip(pairwise(d), y[1:], strict=False):
        terms = ((older, older), (older, level), (level, level), (newer, older), (newer, level))
        sums = [s + (a @ b).item() for s, (a, b) in zip(sums, terms, strict=True)]
    fit.copy_(torch.tensor(solve(sums, ridge), dtype=torch.float64, device="cpu"))


def equally_spaced(steps: list[int]) -> int:
    """Return how many of `steps`, newest first, are as far apart as the first two."""
    count = min(len(steps), 2)
    while count < len(steps) and steps[count - 1] - steps[count] == steps[0] - steps[1]:
        count += 1
    return count


def solve(sums: list[float], ridge: float) -> tuple[float, float]:
    """Return (alpha, gamma) of the normal equations, or NaN."""
    dd, dy, yy, b_d, b_y = sums
    p, q = dd + ridge * dd, yy + ridge * yy
    b_d = b_d + ridge * dd
    determinant = p * q - dy * dy
    if not determinant > SINGULAR * (p * q):
        return float("nan"), float("nan")
    return (b_d * q - b_y * dy) / determinant, (p * b_y - dy * b_d) / determinant


@op(fit_recurrence_reference, like="ring", mutates=("counters", "fit"))
def _fit_recurrence(ring, counters, fit, ridge):
    size, slots = ring[0].numel(), ring.shape[0]
    per_program, programs = partition_of(size)
    partials = torch.empty(NUM_SUMS, programs, device=ring.device, dtype=torch.float32)
    _fit_recurrence_kernel[(programs,)](
        ring, counters, partials, fit, size, per_program, slots, ridge,
        LOG_BLOCK=log2(BLOCK), LOG_LANES=log2(MAX_LANES),
        num_warps=num_warps(ring.element_size()), enable_fp_fusion=False,
    )  # fmt: skip


class Snapshots(NamedTuple):
    """The ring in a kernel; `newest` is the slot of the newest snapshot."""

    ring_ptr: Any
    newest: Any
    slots: Any
    size: Any


@triton.jit(do_not_specialize=["per_program", "slots"])
def _fit_recurrence_kernel(
    ring_ptr, counters_ptr, partials_ptr, fit_ptr, size, per_program, slots, ridge,
    LOG_BLOCK: tl.constexpr, LOG_LANES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    newest = tl.load(counters_ptr + LANE.HEAD) - 1 + slots
    triples = _triples(counters_ptr, newest, slots)
    snapshots = Snapshots(ring_ptr, newest, slots, size)
    base = tl.zeros((1 << LOG_BLOCK,), tl.float32)
    dd, dy, yy, b_d, b_y = base, base, base, base, base
    if triples > 0:
        for i in range(per_program):
            offsets = lanes_of(program, per_program, i, LOG_BLOCK)
            mask = offsets < size
            level = _snapshot(snapshots, 1, offsets, mask)
            newer = _snapshot(snapshots, 0, offsets, mask) - level
            for age in range(2, triples + 2):
                oldest = _snapshot(snapshots, age, offsets, mask)
                older = level - oldest
                dd += older * older
                dy += older * level
                yy += level * level
                b_d += newer * older
                b_y += newer * level
                newer, level = older, oldest
    sums_ptr, sums = partials_ptr + program, (dd, dy, yy, b_d, b_y)
    for i in tl.static_range(FIT.NUM_SUMS):
        tl.store(sums_ptr + i * programs, tree_sum_lanes(sums[i], LOG_BLOCK))
    # as in `probe_and_decide`: the ticket makes all stores visible to the last program
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + LANE.TICKET, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.debug_barrier()
        tl.store(counters_ptr + LANE.TICKET, 0)
        _solve(partials_ptr, fit_ptr, programs, ridge, LOG_LANES)


@triton.jit
def _triples(counters_ptr, newest, slots):
    """Return the number of triples of equally spaced snapshots, the function above less 2."""
    snapshots = tl.load(counters_ptr + LANE.SNAPSHOTS)
    ring_ptr = counters_ptr + LANE.RING_STEPS
    count = tl.full((), 0, tl.int32)
    first_gap = tl.load(ring_ptr + newest % slots) - tl.load(
        ring_ptr + (newest + slots - 1) % slots
    )
    for age in range(2, snapshots):
        newer = tl.load(ring_ptr + (newest + slots - age + 1) % slots)
        gap = newer - tl.load(ring_ptr + (newest + slots - age) % slots)
        count += ((gap == first_gap) & (count == age - 2)).to(tl.int32)
    return count


@triton.jit
def _snapshot(snapshots, age, offsets, mask):
    slot = (snapshots.newest + snapshots.slots - age) % snapshots.slots
    slot_ptr = snapshots.ring_ptr + tl.cast(snapshots.size, tl.int64) * slot
    return tl.load(slot_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _solve(partials_ptr, fit_ptr, programs, ridge, LOG_LANES: tl.constexpr):
    """The function `solve` above, of the columns' sums."""
    dd = sum_of_column(partials_ptr, programs, LOG_LANES, 1).to(tl.float64)
    dy = sum_of_column(partials_ptr + programs, programs, LOG_LANES, 1).to(tl.float64)
    yy = sum_of_column(partials_ptr + 2 * programs, programs, LOG_LANES, 1).to(tl.float64)
    b_d = sum_of_column(partials_ptr + 3 * programs, programs, LOG_LANES, 1).to(tl.float64)
    b_y = sum_of_column(partials_ptr + 4 * programs, programs, LOG_LANES, 1).to(tl.float64)
    pull = tl.cast(ridge, tl.float64)
    p, q = dd + pull * dd, yy + pull * yy
    b_d = b_d + pull * dd
    determinant = p * q - dy * dy
    solvable = determinant > FIT.SINGULAR * (p * q)
    divisor = tl.where(solvable, determinant, 1.0)
    alpha, gamma = (b_d * q - b_y * dy) / divisor, (p * b_y - dy * b_d) / divisor
    tl.store(fit_ptr, tl.where(solvable, alpha, float("nan")))
    tl.store(fit_ptr + 1, tl.where(solvable, gamma, float("nan")))
