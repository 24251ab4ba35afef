"""Weights that predict a step from the snapshots in the ring, in Python and as a Triton function.

They are those of TaylorSeer (arXiv:2503.06923) on the residuals, with backward differences taken
over the distances of the snapshots, as cache-dit (github.com/vipshop/cache-dit) takes them. The two
agree bit for bit: each operation is float32, rounded once, in the same order.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import triton
import triton.language as tl

from dbcache.kernels.lane_state import MAX_SLOTS
from dbcache.kernels.sums import f32

_MAX_SLOTS = tl.constexpr(MAX_SLOTS)


def taylor_weights(ages: Sequence[int], order: int) -> list[float]:
    """Return the weights that predict the current step from snapshots `ages` steps old.

    With Y_m the snapshots, newest first, g_m = ages[m + 1] - ages[m] and k = ages[0]:

        D(0)_m = Y_m,  D(i+1)_m = (D(i)_m - D(i)_{m+1}) / g_m
        prediction = sum over i <= L of k^i / i! * D(i)_0,  L = min(order, len(ages) - 1)

    which is linear in Y. The weights are its adjoint, taken from the highest difference down. There
    are L + 1 of them; older snapshots have weight 0.
    """
    last = max(0, min(order, len(ages) - 1))
    coefficients = [1.0]
    for i in range(1, last + 1):
        coefficients.append(f32(f32(coefficients[-1] * ages[0]) / i))
    weights = [coefficients[last]]
    for i in range(last - 1, -1, -1):
        parts = [f32(w / (ages[m + 1] - ages[m])) for m, w in enumerate(weights)]
        weights = [f32(parts[0] + coefficients[i])]
        weights += [f32(after - before) for before, after in pairwise(parts)]
        weights.append(-parts[-1])
    return weights


@lru_cache(maxsize=4096)
def weights_by_slot(ages: tuple[int, ...], order: int, head: int, slots: int) -> list[float]:
    """Spread the weights over the ring. Requests repeat the same few patterns of ages."""
    by_slot = [0.0] * MAX_SLOTS
    for m, weight in enumerate(taylor_weights(ages, order)):
        by_slot[(head - 1 - m) % slots] = weight
    return by_slot


@triton.jit
def store_weights(weights_ptr, ring_ptr, step, head, slots, snapshots, order):
    """The function `taylor_weights` above, on vectors over m, stored by slot."""
    m = tl.arange(0, _MAX_SLOTS)
    slot = (head - 1 - m + _MAX_SLOTS * slots) % slots
    older = (head - 2 - m + _MAX_SLOTS * slots + slots) % slots
    steps = tl.load(ring_ptr + slot)
    # 1 where there is no older snapshot, so that 0 / gap stays 0 there
    gap = tl.where(m + 1 < snapshots, steps - tl.load(ring_ptr + older), 1).to(tl.float32)
    distance = (step - tl.load(ring_ptr + (head - 1 + slots) % slots)).to(tl.float32)

    last = tl.maximum(tl.minimum(order, snapshots - 1), 0)
    coefficient = tl.full((), 1.0, tl.float32)
    coefficients = tl.where(m == 0, coefficient, 0.0)
    for i in range(1, last + 1):
        coefficient = tl.div_rn(coefficient * distance, tl.cast(i, tl.float32))
        coefficients = tl.where(m == i, coefficient, coefficients)

    weights = tl.where(m == 0, coefficient, 0.0)
    for i in range(last - 1, -1, -1):
        part = tl.div_rn(weights, gap)
        before = tl.sum(tl.where(m[None, :] + 1 == m[:, None], part[None, :], 0.0), axis=1)
        coefficient = tl.sum(tl.where(m == i, coefficients, 0.0), axis=0)
        weights = part - before
        weights = tl.where(m == 0, weights + coefficient, weights)
    tl.store(weights_ptr + tl.where(m < slots, slot, m), weights)
