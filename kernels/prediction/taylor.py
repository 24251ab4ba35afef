"""Weights that predict a step from the snapshots in the ring, in Python and as a Triton function.

Each predictor is a series in backward differences; they differ in the coefficients and in the
distances that the differences are divided by (`taylor_weights`). The two implementations agree
bit for bit: each operation is float32, rounded once, in the same order.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import triton
import triton.language as tl

from dbcache.kernels.common.constants import Constants
from dbcache.kernels.common.lane_state import LANE, PREDICTORS, Predictor, spread
from dbcache.kernels.common.sums import f32

SETTLED = 3
"""Index of the first full step from which TAYLOR takes a difference, as in cache-dit."""
TAYLOR = Constants(globals())


def taylor_weights(
    ages: Sequence[int], order: int, predictor: int = Predictor.TAYLOR, scale: float = 0.0
) -> list[float]:
    """Return the weights that predict the current step from snapshots `ages` steps old.

    With Y_m the snapshots, newest first, a_m = ages[m], k = a_0 and L = min(order, len(ages) - 1):

        D(0)_m = Y_m,  D(i+1)_m = (D(i)_m - D(i)_{m+1}) / g
        prediction = sum over i <= L of c_i * D(i)_0

        TAYLOR   g = a_{m+1} - a_m    c_i = k^i / i!          TaylorSeer (arXiv:2503.06923), with
                                                              distances as cache-dit takes them
        NEWTON   g = a_{m+i+1} - a_m  c_i = a_0 ... a_{i-1}   the polynomial through the newest
                                                              L + 1 snapshots
        HERMITE  g = a_{m+1} - a_m    c_i = s^i H_i(s k) / i! HiCache, H_i the physicists' Hermite
                                                              polynomials and `scale` = 2 s^2
        FOCA     as NEWTON            c_1 = k, c_2 = min(k, scale g_0) g_0, g_0 = a_1 - a_0, L <= 2

    FOCA is Y_0 + k v with v the slope at Y_0 of the parabola through three snapshots (BDF2 with
    unequal steps), as far as `scale` gaps; beyond, it goes on with the slope of the last gap. It is
    FoCa's (arXiv:2508.16211) forecast with a bound in place of the corrections in between.

    The prediction is linear in Y. The weights are its adjoint, taken from the highest difference
    down. There are L + 1 of them; older snapshots have weight 0.
    """
    last = max(0, min(order, len(ages) - 1))
    foca = predictor == Predictor.FOCA
    if foca:
        last = min(last, 2)
    newton = foca or predictor == Predictor.NEWTON
    coefficients, before = [1.0], 0.0
    for i in range(1, last + 1):
        latest = coefficients[-1]
        if foca and i == 2:
            gap = ages[1] - ages[0]
            following = f32(min(ages[0], f32(scale * gap)) * gap)
        elif newton:
            following = f32(latest * ages[i - 1])
        elif predictor == Predictor.HERMITE:
            # H_{i+1}(x) = 2 x H_i(x) - 2 i H_{i-1}(x)
            grown = f32(latest * f32(scale * ages[0]))
            following = f32(f32(grown - f32(before * scale)) / i)
        else:
            following = f32(f32(latest * ages[0]) / i)
        coefficients.append(following)
        before = latest
    weights = [coefficients[last]]
    for i in range(last - 1, -1, -1):
        reach = i + 1 if newton else 1
        parts = [f32(w / (ages[m + reach] - ages[m])) for m, w in enumerate(weights)]
        weights = [f32(parts[0] + coefficients[i])]
        weights += [f32(after - before) for before, after in pairwise(parts)]
        weights.append(-parts[-1])
    return weights


def reached(steps: Sequence[int], order: int, predictor: int) -> int:
    """Return the order that the snapshots at `steps` allow, besides their number.

    TAYLOR has a difference of order i once the newest i full steps are at step 3 or later, as in
    cache-dit: residuals change erratically at first, and what is made of that goes astray.
    """
    return min(order, sum(s >= SETTLED for s in steps)) if predictor == Predictor.TAYLOR else order


@lru_cache(maxsize=4096)
def weights_by_slot(
    step: int, steps: tuple[int, ...], order: int, ring: tuple[int, int], rule: tuple[int, float]
) -> "array[float]":
    """Return the weights for `step` by slot, of snapshots at `steps`. Requests repeat the same.

    Args:
        step: that is predicted.
        steps: of the snapshots, newest first.
        order: of the prediction, at most.
        ring: slot that the next full step will write, and number of slots.
        rule: the predictor and its scale.
    """
    (head, slots), (predictor, scale) = ring, rule
    ages, order = [step - s for s in steps], reached(steps, order, predictor)
    return array("f", spread(taylor_weights(ages, order, predictor, scale), head, slots))


class Ring(NamedTuple):
    """The steps of the snapshots in a ring, in a kernel."""

    steps_ptr: Any
    head: Any
    slots: Any
    snapshots: Any


@triton.jit
def store_weights(weights_ptr, ring, step, order, predictor, scale):
    """`taylor_weights` of the order that is `reached`, on vectors over m, stored by slot."""
    ring_ptr, slots, snapshots = ring.steps_ptr, ring.slots, ring.snapshots
    m = tl.arange(0, LANE.MAX_SLOTS)
    newest = ring.head - 1 + 2 * LANE.MAX_SLOTS * slots
    slot = (newest - m) % slots
    steps = tl.load(ring_ptr + slot)
    distance = (step - tl.load(ring_ptr + newest % slots)).to(tl.float32)

    foca = predictor == PREDICTORS.FOCA
    newton = foca | (predictor == PREDICTORS.NEWTON)
    last = tl.maximum(tl.minimum(order, snapshots - 1), 0)
    last = tl.where(foca, tl.minimum(last, 2), last)
    settled = tl.sum(((steps >= TAYLOR.SETTLED) & (m < snapshots)).to(tl.int32), axis=0)
    last = tl.where(predictor == PREDICTORS.TAYLOR, tl.minimum(last, settled), last)
    latest = tl.full((), 1.0, tl.float32)
    previous = tl.full((), 0.0, tl.float32)
    coefficients = tl.where(m == 0, latest, 0.0)
    for i in range(1, last + 1):
        age = (step - tl.load(ring_ptr + (newest - i + 1) % slots)).to(tl.float32)
        grown = latest * distance
        grown = tl.where(newton, latest * age, grown)
        hermite = latest * (scale * distance) - previous * scale
        grown = tl.where(predictor == PREDICTORS.HERMITE, hermite, grown)
        gap = age - distance
        bounded = tl.minimum(distance, scale * gap) * gap
        grown = tl.where(foca & (i == 2), bounded, grown)
        divisor = tl.where(newton, 1, i).to(tl.float32)
        previous = latest
        latest = tl.div_rn(grown, divisor)
        coefficients = tl.where(m == i, latest, coefficients)

    weights = tl.where(m == 0, latest, 0.0)
    for i in range(last - 1, -1, -1):
        reach = tl.where(newton, i + 1, 1)
        older = tl.load(ring_ptr + (newest - m - reach) % slots)
        # 1 where there is no older snapshot, so that 0 / gap stays 0 there
        gap = tl.where(m + reach < snapshots, steps - older, 1).to(tl.float32)
        part = tl.div_rn(weights, gap)
        before = tl.sum(tl.where(m[None, :] + 1 == m[:, None], part[None, :], 0.0), axis=1)
        coefficient = tl.sum(tl.where(m == i, coefficients, 0.0), axis=0)
        weights = part - before
        weights = tl.where(m == 0, weights + coefficient, weights)
    tl.store(weights_ptr + tl.where(m < slots, slot, m), weights)
