"""What a step's measurement contributes to its decision, in Python and as Triton functions.

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
from dbcache.kernels.common.lane_state import BatchReduce, Signal
from dbcache.kernels.common.sums import f32, relative_l1, relative_l1_of_partials, total_sums


def signal_of(
    partials: Sequence[Sequence[Sequence[float]]],
    limits: Sequence[int],
    thresholds: Sequence[float],
    values: Sequence[float],
) -> float:
    """Return e of partial sums, nested lists (B, T, 2 or 4), for a lane's state."""
    signal = limits[ls.SIGNAL]
    if signal == Signal.RATE:
        return f32(values[ls.RATE] * total_sums(partials)[0])
    change = relative_l1(partials, limits[ls.BATCH_REDUCE] == BatchReduce.MAX)
    return polynomial(thresholds, change) if signal == Signal.SUM else change


def polynomial(thresholds: Sequence[float], x: float) -> float:
    """Return the polynomial at `x`; the coefficients begin with that of the highest power."""
    result = thresholds[ls.POLYNOMIAL]
    for i in range(1, ls.DEGREE + 1):
        result = f32(f32(result * x) + thresholds[ls.POLYNOMIAL + i])
    return result


def is_ready(limits: Sequence[int], values: Sequence[float]) -> bool:
    """Whether the signal can be measured: a rate needs two full steps."""
    return limits[ls.SIGNAL] != Signal.RATE or not values[ls.RATE] < 0


# Triton functions can read globals that are constexpr, and no others
_SIGNAL, _RATE_AT = tl.constexpr(ls.SIGNAL), tl.constexpr(ls.RATE)
_POLYNOMIAL, _DEGREE = tl.constexpr(ls.POLYNOMIAL), tl.constexpr(ls.DEGREE)
_SUM, _RATE = tl.constexpr(int(Signal.SUM)), tl.constexpr(int(Signal.RATE))
_CHANGE = tl.constexpr(int(Signal.CHANGE))
_BATCH_REDUCE, _BATCH_MAX = tl.constexpr(ls.BATCH_REDUCE), tl.constexpr(int(BatchReduce.MAX))


@triton.jit
def signal_of_partials(
    partials_ptr,
    samples,
    programs,
    limits_ptr,
    thresholds_ptr,
    values_ptr,
    LOG_LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The function `signal_of` above, for (samples, programs, WIDTH) partial sums."""
    mean, largest, moved = relative_l1_of_partials(
        partials_ptr, samples, programs, LOG_LANES, WIDTH
    )
    change = tl.where(tl.load(limits_ptr + _BATCH_REDUCE) == _BATCH_MAX, largest, mean)
    signal = tl.load(limits_ptr + _SIGNAL)
    result = tl.load(thresholds_ptr + _POLYNOMIAL)
    for i in tl.static_range(1, _DEGREE + 1):
        result = result * change + tl.load(thresholds_ptr + _POLYNOMIAL + i)
    change = tl.where(signal == _SUM, result, change)
    return tl.where(signal == _RATE, tl.load(values_ptr + _RATE_AT) * moved, change)


@triton.jit
def is_summed(limits_ptr):
    """Whether the sum since the last full step is what is compared with the threshold."""
    return tl.load(limits_ptr + _SIGNAL) != _CHANGE


@triton.jit
def is_signal_ready(limits_ptr, values_ptr):
    """The function `is_ready` above."""
    return (tl.load(limits_ptr + _SIGNAL) != _RATE) | ~(tl.load(values_ptr + _RATE_AT) < 0.0)
