"""Weights of a ridge regression on Chebyshev polynomials, in Python and as a Triton kernel.

With s_m the steps of the n snapshots in the ring, newest first, t the current step, T_0 ... T_M the
Chebyshev polynomials and x(s) = 2 s / last - 1 with `last` the index of the request's last step:

    w = Phi (Phi^T Phi + ridge I)^-1 phi(x(t)),  Phi[m, j] = phi_j(x(s_m)) = T_j(x(s_m))

Of this and of the straight line through the two newest snapshots, `blend` parts are the former.
M is at most half the number of snapshots, so that there are two for each degree. The idea, and
M = 4 and half and half, are Spectrum's (arXiv:2603.01623), which fits all full steps of the
request; here they are those in the ring.

The two implementations agree bit for bit: each operation is float64, rounded once, in the same
order, and the weights are rounded to float32 at the end. The system is solved by Gauss-Jordan
elimination without pivoting, which is stable as the matrix is positive definite.
"""

from functools import lru_cache

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

MAX_ORDER = 4
"""Highest degree of the polynomials."""

# entries of the parameters, float64
ORDER = 0  # degree for hidden states, 0 leaves their weights alone
ENCODER_ORDER = 1  # the same for encoder hidden states
RIDGE = 2  # above 0
BLEND = 3  # share of the regression; the rest is the straight line
LAST_STEP = 4  # index of the last step of the request, at least 1
NUM_PARAMETERS = 5

SIZE = MAX_ORDER + 1
"""Number of polynomials."""
WIDTH = 8
"""SIZE, rounded up to a power of 2."""
SPECTRUM = Constants(globals())


def spectrum_weights(state: LaneState, parameters: Tensor, *, impl: Impl = "auto") -> None:
    """Overwrite the weights of the cached step that `decide` has just decided, in place.

    Args:
        state: state of the lane, after `decide` and before the next step. ``state.weights`` and
            ``state.encoder_weights`` are written, each unless its order is 0.
        parameters: float64 (NUM_PARAMETERS,) on the state's device; entries as named above.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the state on the host, which synchronises if it is on a GPU; Triton does
    not.

    Raises:
        ValueError: `parameters` does not fit.
    """
    form = (torch.float64, (NUM_PARAMETERS,), state.counters.device)
    check_tensor("spectrum_weights", "parameters", parameters, *form)
    _spectrum_weights(impl, state, parameters)


def spectrum_weights_reference(state: LaneState, parameters: Tensor) -> None:
    """Plain Python, the meaning of `spectrum_weights`."""
    order, encoder_order, ridge, blend, last = parameters.tolist()
    numbers, slots = state.counters.tolist(), state.limits.tolist()[ls.SLOTS]
    steps, step = tuple(ls.steps_newest_first(numbers, slots)), numbers[ls.STEP] - 1
    for into, degree in ((state.weights, order), (state.encoder_weights, encoder_order)):
        if degree >= 1:
            weights = chebyshev_weights(steps, step, int(degree), ridge, blend, last)
            ls.write_weights(into, weights, numbers[ls.HEAD], slots)


@lru_cache(maxsize=4096)
def chebyshev_weights(
    steps: tuple[int, ...], step: int, order: int, ridge: float, blend: float, last: float
) -> list[float]:
    """Return the weights that predict `step` from snapshots taken at `steps`, newest first.

    Requests repeat the same few patterns of steps, so they are kept.
    """
    if len(steps) == 1:
        return [1.0]
    size = min(order, len(steps) // 2) + 1
    rows = [_polynomials(s, last, size) for s in steps]
    x = _polynomials(step, last, size)
    matrix = [[0.0] * size for _ in range(size)]
    for row in rows:
        for i in range(size):
            for j in range(size):
                matrix[i][j] += row[i] * row[j]
    for i in range(size):
        matrix[i][i] += ridge
    for p in range(size):
        for i in range(size):
            factor = matrix[i][p] / matrix[p][p]
            if i != p:
                x[i] -= factor * x[p]
                matrix[i] = [a - factor * b for a, b in zip(matrix[i], matrix[p], strict=True)]
    x = [x[i] / matrix[i][i] for i in range(size)]
    weights = []
    for row in rows:
        total = 0.0
        for t, c in zip(row, x, strict=True):
            total += t * c
        weights.append(blend * total)
    ahead = float(step - steps[0]) / float(steps[0] - steps[1])
    line = [1.0 + ahead, -ahead] + [0.0] * (len(steps) - 2)  # through the two newest snapshots
    return [f32(w + (1 - blend) * v) for w, v in zip(weights, line, strict=True)]


def _polynomials(step: int, last: float, size: int) -> list[float]:
    """Return T_0 ... T_{size - 1} at `step`."""
    x = 2.0 * step / last - 1.0
    values = [1.0, x]
    while len(values) < size:
        values.append(2.0 * x * values[-1] - values[-2])
    return values[:size]


@op(spectrum_weights_reference, like="state.counters", mutates=("values",))
def _spectrum_weights(state, parameters):
    args = (state.counters, state.values, state.limits, parameters)
    _spectrum_kernel[(2,)](*args, num_warps=1, enable_fp_fusion=False)


@triton.jit
def _spectrum_kernel(counters_ptr, values_ptr, limits_ptr, parameters_ptr):
    """Program 0 weighs the hidden states, program 1 the encoder states."""
    stream = tl.program_id(0)
    order = tl.load(parameters_ptr + stream).to(tl.int32)
    if order >= 1:
        base = tl.where(stream == 0, LANE.WEIGHTS, LANE.ENCODER_WEIGHTS)
        _store(counters_ptr, values_ptr + base, limits_ptr, parameters_ptr, order)


@triton.jit
def _store(counters_ptr, weights_ptr, limits_ptr, parameters_ptr, order):
    """The function `chebyshev_weights` above, on a tile (m, j), stored by slot."""
    m, j = tl.arange(0, LANE.MAX_SLOTS), tl.arange(0, SPECTRUM.WIDTH)
    slots = tl.load(limits_ptr + LANE.SLOTS)
    newest = tl.load(counters_ptr + LANE.HEAD) - 1 + 2 * LANE.MAX_SLOTS * slots
    slot = (newest - m) % slots
    snapshots = tl.load(counters_ptr + LANE.SNAPSHOTS)
    order = tl.minimum(order, snapshots // 2)
    filled = m < snapshots
    steps = tl.load(counters_ptr + LANE.RING_STEPS + slot)
    step = tl.load(counters_ptr + LANE.STEP) - 1
    last = tl.load(parameters_ptr + SPECTRUM.LAST_STEP)
    phi = _polynomials_of(steps, last, order, j[None, :])
    phi = tl.where(filled[:, None], phi, 0.0)
    x = _polynomials_of(step + 0 * j, last, order, j[None, :])  # all rows are equal
    x = tl.sum(tl.where(j[:, None] == 0, x, 0.0), axis=0)

    i = j[:, None]
    matrix = tl.zeros((SPECTRUM.WIDTH, SPECTRUM.WIDTH), tl.float64)
    for row in tl.static_range(LANE.MAX_SLOTS):
        across = tl.sum(tl.where(m[:, None] == row, phi, 0.0), axis=0)
        down = tl.sum(tl.where(i == j[None, :], across[None, :], 0.0), axis=1)
        matrix += down[:, None] * across[None, :]
    on_diagonal = i == j[None, :]
    # 1 where there is no polynomial, so that those equations are 1 * 0 = 0
    ridge = tl.where(i <= order, tl.load(parameters_ptr + SPECTRUM.RIDGE), 1.0)
    matrix = tl.where(on_diagonal, matrix + ridge, matrix)
    for p in tl.static_range(SPECTRUM.SIZE):
        row = tl.sum(tl.where(i == p, matrix, 0.0), axis=0)
        column = tl.sum(tl.where(j[None, :] == p, matrix, 0.0), axis=1)
        pivot = tl.sum(tl.where(j == p, row, 0.0), axis=0)
        factor = tl.where(j == p, 0.0, column / pivot)
        x -= factor * tl.sum(tl.where(j == p, x, 0.0), axis=0)
        matrix -= factor[:, None] * row[None, :]
    x = x / tl.sum(tl.where(on_diagonal, matrix, 0.0), axis=0)

    weights = tl.zeros((LANE.MAX_SLOTS,), tl.float64)
    for p in tl.static_range(SPECTRUM.SIZE):
        column = tl.sum(tl.where(j[None, :] == p, phi, 0.0), axis=1)
        weights += column * tl.sum(tl.where(j == p, x, 0.0), axis=0)
    newest_step = tl.sum(tl.where(m == 0, steps, 0), axis=0)
    second = tl.sum(tl.where((m == 1) & filled, steps, 0), axis=0)
    has_line = snapshots > 1
    blend = tl.where(has_line, tl.load(parameters_ptr + SPECTRUM.BLEND), 0.0)
    gap = tl.where(has_line, newest_step - second, 1).to(tl.float64)
    ahead = tl.where(has_line, (step - newest_step).to(tl.float64) / gap, 0.0)
    line = tl.where(m == 0, 1.0 + ahead, tl.where((m == 1) & filled, 0.0 - ahead, 0.0))
    weights = (blend * weights + (1.0 - blend) * line).to(tl.float32)
    weights = tl.where(filled, weights, 0.0)
    tl.store(weights_ptr + tl.where(m < slots, slot, m), weights)


@triton.jit
def _polynomials_of(steps, last, order, j):
    """Return T_j of `steps` as a tile (steps, j), 0 for j > order."""
    x = ((2.0 * steps.to(tl.float64)) / last - 1.0)[:, None]
    before, latest = tl.full(x.shape, 1.0, tl.float64), x
    values = tl.where(j == 0, before, tl.where(j == 1, latest, 0.0))
    for degree in tl.static_range(2, SPECTRUM.SIZE):
        before, latest = latest, 2.0 * x * latest - before
        values = tl.where(j == degree, latest, values)
    return tl.where(j <= order, values, 0.0)
