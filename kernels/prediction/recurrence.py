"""Weights that continue a linear recurrence between and beyond its steps, in Python and Triton.

Snapshots Y_0 (newest) and Y_1, a gap g apart, that follow Y_{i-1} = c_1 Y_i + c_2 Y_{i+1} are sums
of two exponentials, whose bases per gap are the roots a and b of x^2 = c_1 x + c_2. So k steps
after the newest, with q = k / g,

    prediction = Re(a^(q+1) - b^(q+1)) / (a - b) Y_0 + c_2 Re(a^q - b^q) / (a - b) Y_1

Roots may be complex or negative. The powers are products of the roots' repeated square roots along
the binary digits of q, as square roots are rounded alike everywhere and logarithms are not.

Without a fit (NaN) or with a root so large that predictions explode, the weights are those of the
straight line through the two newest snapshots. The two implementations agree bit for bit: each
operation is float64, rounded once, in the same order; the weights are rounded to float32.
"""

from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.checks import check_tensor
from dbcache.kernels.common.constants import Constants
from dbcache.kernels.common.lane_state import LANE, LaneState
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import Impl
from dbcache.kernels.common.sums import f32

DIGITS = 32
"""Binary digits of the fraction of q."""

LARGEST_ROOT = 2.0
"""Largest absolute value of a root per gap: what doubles between two full steps is not forecast."""

CLOSE = 1e-12
"""Square of the distance of two roots, relative to theirs from 0, below which they are one."""

LARGEST_SQUARE = LARGEST_ROOT**2
RECURRENCE = Constants(globals())


def recurrence_weights(
    state: LaneState, fit: Tensor | None, encoder_fit: Tensor | None = None, *, impl: Impl = "auto"
) -> None:
    """Overwrite the weights of the cached step that `decide` has just decided, in place.

    Args:
        state: state of the lane, after `decide` and before the next step.
        fit: float64 (2,), (alpha, gamma) from `fit_recurrence` for the hidden states, so that
            c_1 = 1 + alpha + gamma and c_2 = -alpha. None leaves their weights alone.
        encoder_fit: the same for encoder hidden states.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the state on the host, which synchronises if it is on a GPU; Triton does
    not.

    Raises:
        ValueError: a fit does not fit the interface.
    """
    form = (torch.float64, (2,), state.counters.device)
    for one in (fit, encoder_fit):
        if one is not None:
            check_tensor("recurrence_weights", "a fit", one, *form)
    _recurrence_weights(impl, state, fit, encoder_fit)


def recurrence_weights_reference(
    state: LaneState, fit: Tensor | None, encoder_fit: Tensor | None
) -> None:
    """Plain Python, the meaning of `recurrence_weights`."""
    numbers, slots = state.counters.tolist(), state.limits.tolist()[ls.SLOTS]
    step = numbers[ls.STEP] - 1
    ages = [step - s for s in ls.steps_newest_first(numbers, slots)]
    for weights, one in ((state.weights, fit), (state.encoder_weights, encoder_fit)):
        if one is not None:
            ls.write_weights(weights, continued(ages, *one.tolist()), numbers[ls.HEAD], slots)


def continued(ages: list[int], alpha: float, gamma: float) -> list[float]:
    """Return the weights of the newest two snapshots (of one, where there is one)."""
    if len(ages) < 2:
        return [1.0]
    gap = ages[1] - ages[0]
    ahead = ages[0] / gap
    line = [f32(1.0 + ahead), f32(-ahead)]
    first = 1.0 + alpha + gamma
    middle = first / 2.0
    inside = middle * middle - alpha
    apart = _root(inside, 0.0)
    a = (middle + apart[0], apart[1])
    b = (middle - apart[0], -apart[1])
    size_a, size_b = _square(a), _square(b)
    if not (size_a <= LARGEST_SQUARE and size_b <= LARGEST_SQUARE):
        return line
    power_a, power_b = _power(a, ages[0], gap), _power(b, ages[0], gap)
    if 4.0 * _square(apart) <= CLOSE * (size_a + size_b):
        w0 = (ahead + 1.0) * power_a[0]
        w1 = -(ahead * (a[0] * power_a[0] - a[1] * power_a[1]))
        return [f32(w0), f32(w1)]
    next_a, next_b = _times(a, power_a), _times(b, power_b)
    twice = (2.0 * apart[0], 2.0 * apart[1])
    w0 = _real_quotient(next_a[0] - next_b[0], next_a[1] - next_b[1], twice)
    w1 = _real_quotient(power_a[0] - power_b[0], power_a[1] - power_b[1], twice)
    return [f32(w0), f32(-(alpha * w1))]


Complex = tuple[float, float]


def _square(z: Complex) -> float:
    return z[0] * z[0] + z[1] * z[1]


def _times(y: Complex, z: Complex) -> Complex:
    return y[0] * z[0] - y[1] * z[1], y[0] * z[1] + y[1] * z[0]


def _real_quotient(x: float, y: float, divisor: Complex) -> float:
    """Return the real part of (x + iy) / divisor."""
    return (x * divisor[0] + y * divisor[1]) / _square(divisor)


def _root(x: float, y: float) -> Complex:
    """Return the principal square root of x + iy."""
    if x == 0.0 and y == 0.0:
        return 0.0, 0.0
    large = sqrt((sqrt(x * x + y * y) + abs(x)) / 2.0)
    small = y / (2.0 * large)
    if x >= 0.0:
        return large, small
    return abs(small), -large if y < 0.0 else large


def _power(z: Complex, steps: int, gap: int) -> Complex:
    """Return z^(steps / gap), the fraction to DIGITS binary digits."""
    result = (1.0, 0.0)
    for _ in range(steps // gap):
        result = _times(result, z)
    rest = steps % gap
    for _ in range(DIGITS):
        z = _root(*z)
        rest *= 2
        if rest >= gap:
            rest -= gap
            result = _times(result, z)
    return result


@op(recurrence_weights_reference, like="state.counters", mutates=("values",))
def _recurrence_weights(state, fit, encoder_fit):
    args = (state.counters, state.values, state.limits, fit, encoder_fit)
    _recurrence_kernel[(1,)](*args, num_warps=1, enable_fp_fusion=False)


@triton.jit
def _recurrence_kernel(counters_ptr, values_ptr, limits_ptr, fit_ptr, encoder_fit_ptr):
    if fit_ptr is not None:
        _store(counters_ptr, values_ptr + LANE.WEIGHTS, limits_ptr, fit_ptr)
    if encoder_fit_ptr is not None:
        _store(counters_ptr, values_ptr + LANE.ENCODER_WEIGHTS, limits_ptr, encoder_fit_ptr)


@triton.jit
def _store(counters_ptr, weights_ptr, limits_ptr, fit_ptr):
    """The function `continued` above, stored by slot."""
    slots = tl.load(limits_ptr + LANE.SLOTS)
    step, snapshots = tl.load(counters_ptr + LANE.STEP) - 1, tl.load(counters_ptr + LANE.SNAPSHOTS)
    newest = tl.load(counters_ptr + LANE.HEAD) - 1 + 2 * slots
    steps = step - tl.load(counters_ptr + LANE.RING_STEPS + newest % slots)
    second = step - tl.load(counters_ptr + LANE.RING_STEPS + (newest - 1) % slots)
    several = snapshots > 1
    gap = tl.where(several, second - steps, 1)
    ahead = steps.to(tl.float64) / gap.to(tl.float64)
    alpha, gamma = tl.load(fit_ptr), tl.load(fit_ptr + 1)
    middle = (1.0 + alpha + gamma) / 2.0
    zero = alpha * 0.0
    apart_x, apart_y = _root_of(middle * middle - alpha, tl.full((), 0.0, tl.float64))
    ax, ay = middle + apart_x, apart_y
    bx, by = middle - apart_x, 0.0 - apart_y
    size_a, size_b = ax * ax + ay * ay, bx * bx + by * by
    largest = RECURRENCE.LARGEST_SQUARE
    usable = (size_a <= largest) & (size_b <= largest) & (zero == 0.0)
    pax, pay = _power_of(ax, ay, steps, gap)
    pbx, pby = _power_of(bx, by, steps, gap)
    is_one = 4.0 * (apart_x * apart_x + apart_y * apart_y) <= RECURRENCE.CLOSE * (size_a + size_b)
    twice_x, twice_y = 2.0 * apart_x, 2.0 * apart_y
    divisor = tl.where(is_one, 1.0, twice_x * twice_x + twice_y * twice_y)
    nax, nay = ax * pax - ay * pay, ax * pay + ay * pax
    nbx, nby = bx * pbx - by * pby, bx * pby + by * pbx
    w0 = ((nax - nbx) * twice_x + (nay - nby) * twice_y) / divisor
    w1 = ((pax - pbx) * twice_x + (pay - pby) * twice_y) / divisor
    w1 = 0.0 - alpha * w1
    w0 = tl.where(is_one, (ahead + 1.0) * pax, w0)
    w1 = tl.where(is_one, 0.0 - ahead * (ax * pax - ay * pay), w1)
    w0, w1 = tl.where(usable, w0, 1.0 + ahead), tl.where(usable, w1, 0.0 - ahead)
    w0, w1 = tl.where(several, w0, 1.0), tl.where(several, w1, 0.0)
    m = tl.arange(0, LANE.MAX_SLOTS)
    weights = tl.where(m == 0, w0, tl.where(m == 1, w1, 0.0)).to(tl.float32)
    slot = (newest + LANE.MAX_SLOTS * slots - m) % slots
    tl.store(weights_ptr + tl.where(m < slots, slot, m), weights)


@triton.jit
def _root_of(x, y):
    """The function `_root` above."""
    is_zero = (x == 0.0) & (y == 0.0)
    large = tl.sqrt((tl.sqrt(x * x + y * y) + tl.abs(x)) / 2.0)
    small = y / (2.0 * tl.where(is_zero, 1.0, large))
    signed = tl.where(y < 0.0, 0.0 - large, large)
    root_x = tl.where(x >= 0.0, large, tl.abs(small))
    root_y = tl.where(x >= 0.0, small, signed)
    return tl.where(is_zero, 0.0, root_x), tl.where(is_zero, 0.0, root_y)


@triton.jit
def _power_of(x, y, steps, gap):
    """The function `_power` above, of x + iy."""
    result_x, result_y = tl.full((), 1.0, tl.float64), tl.full((), 0.0, tl.float64)
    for _ in range(steps // gap):
        result_x, result_y = result_x * x - result_y * y, result_x * y + result_y * x
    rest = steps % gap
    for _ in range(RECURRENCE.DIGITS):
        x, y = _root_of(x, y)
        rest *= 2
        bit = rest >= gap
        rest = tl.where(bit, rest - gap, rest)
        next_x, next_y = result_x * x - result_y * y, result_x * y + result_y * x
        result_x, result_y = tl.where(bit, next_x, result_x), tl.where(bit, next_y, result_y)
    return result_x, result_y
