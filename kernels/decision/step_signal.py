"""How a step's measurement enters its decision, in Python and as Triton functions.

    Signal.CHANGE   e = d                        compared with the threshold by itself
    Signal.SUM      e = p(d)                     p a polynomial of degree 4
    Signal.RATE     e = rate * sum|x - x_before|

with d the relative L1 of `sums`. For the last two the sum of e over the steps since the last full
one is compared, this step's included. SUM is TeaCache's rule (arXiv:2411.19108), and with p(d) = d
SeaCache's (arXiv:2602.18993); RATE is EasyCache's (arXiv:2507.02860), `rate` being that of
`transformation_rate`. The two implementations agree bit for bit: each operation is float32,
rounded once, in the same order.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import (
    LANE,
    REDUCTIONS,
    SIGNALS,
    BatchReduce,
    Numbers,
    Signal,
)
from dbcache.kernels.common.sums import f32, relative_l1, relative_l1_of_partials, total_sums

RATE, SUM, WORST = Signal.RATE, Signal.SUM, BatchReduce.MAX


def signal_of(partials: Sequence[Sequence[Sequence[float]]], lane: Numbers) -> float:
    """Return e of partial sums, nested lists (B, T, 2 or 4), for a lane's state."""
    _, values, limits, thresholds = lane[:4]
    signal = limits[ls.SIGNAL]
    if signal == RATE:
        return f32(values[ls.RATE] * total_sums(partials)[0])
    change = relative_l1(partials, limits[ls.BATCH_REDUCE] == WORST)
    return polynomial(thresholds, change) if signal == SUM else change


def polynomial(thresholds: Sequence[float], x: float) -> float:
    """Return the polynomial at `x`; coefficients from the highest power down."""
    result = thresholds[ls.POLYNOMIAL]
    for i in range(1, ls.DEGREE + 1):
        result = f32(f32(result * x) + thresholds[ls.POLYNOMIAL + i])
    return result


def is_ready(limits: Sequence[int], values: Sequence[float]) -> bool:
    """Whether the signal can be measured: a rate needs two full steps."""
    return limits[ls.SIGNAL] != RATE or not values[ls.RATE] < 0


@triton.jit
def signal_of_partials(partials, state, LOG_LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The function `signal_of` above, for `Partials` of WIDTH sums and a `State`."""
    mean, largest, moved, _ = relative_l1_of_partials(partials, LOG_LANES, WIDTH)
    reduce = tl.load(state.limits_ptr + LANE.BATCH_REDUCE)
    change = tl.where(reduce == REDUCTIONS.MAX, largest, mean)
    signal = tl.load(state.limits_ptr + LANE.SIGNAL)
    result = tl.load(state.thresholds_ptr + LANE.POLYNOMIAL)
    for i in tl.static_range(1, LANE.DEGREE + 1):
        result = result * change + tl.load(state.thresholds_ptr + LANE.POLYNOMIAL + i)
    change = tl.where(signal == SIGNALS.SUM, result, change)
    is_rate = signal == SIGNALS.RATE
    return tl.where(is_rate, tl.load(state.values_ptr + LANE.RATE) * moved, change)


@triton.jit
def is_summed(state):
    """Whether the sum since the last full step is compared with the threshold."""
    return tl.load(state.limits_ptr + LANE.SIGNAL) != SIGNALS.CHANGE


@triton.jit
def is_signal_ready(state):
    """The function `is_ready` above."""
    needs_no_rate = tl.load(state.limits_ptr + LANE.SIGNAL) != SIGNALS.RATE
    return needs_no_rate | ~(tl.load(state.values_ptr + LANE.RATE) < 0.0)
