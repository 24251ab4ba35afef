"""Weights of the Chebyshev ridge regression against NumPy, and both implementations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState, PlanCode
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.prediction.spectrum import MAX_ORDER, chebyshev_weights, spectrum_weights

LAST = 49.0
ORDERS = st.integers(1, MAX_ORDER)
GAPS = st.lists(st.integers(1, 7), min_size=1, max_size=8)


def newest_first(gaps):
    """Return steps, newest first, and a step after them."""
    steps = np.cumsum(gaps)[::-1]
    return tuple(int(s) for s in steps), int(steps[0]) + gaps[0]


def fitted(steps, step, order, ridge, blend):
    """Spectrum as it is told, with NumPy's polynomials and solver, in float64."""
    if len(steps) == 1:
        return np.ones(1)
    order = min(order, len(steps) // 2)
    basis = np.polynomial.chebyshev.chebvander(2 * np.array(steps) / LAST - 1, order)
    at = np.polynomial.chebyshev.chebvander(np.array([2 * step / LAST - 1]), order)[0]
    gram = basis.T @ basis + ridge * np.eye(order + 1)
    weights = blend * basis @ np.linalg.solve(gram, at)
    line = np.polyfit(steps[:2], np.eye(2), 1)
    weights[:2] += (1 - blend) * np.polyval(line, step)
    return weights


@given(gaps=GAPS, order=ORDERS, ridge=st.sampled_from([1e-4, 1e-2, 0.1, 3.0]),
       blend=st.sampled_from([1.0, 0.5, 0.0]))  # fmt: skip
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_weights_are_the_ridge_regression(gaps, order, ridge, blend):
    steps, step = newest_first(gaps)
    weights = chebyshev_weights(steps, step, order, ridge, blend, LAST)
    expected = fitted(steps, step, order, ridge, blend)
    assert weights == pytest.approx(expected, abs=1e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
def test_a_vanishing_ridge_is_exact_on_polynomials_at_uneven_gaps(order):
    steps, step = newest_first([3, 5, 1, 4, 2, 1, 1, 6][: 2 * order])
    weights = chebyshev_weights(steps, step, order, 1e-13, 1.0, LAST)
    for degree in range(order + 1):
        values = [(s / step) ** degree for s in steps]
        assert np.dot(weights, values) == pytest.approx(1, abs=1e-5 * np.abs(weights).sum())


def decided(device, full, slots, order, encoder_order):
    """Return the state of a lane with full steps at `full` that caches the one after them."""
    state = LaneState.allocate(full[-1] + 8, device)
    state.limits[ls.SLOTS] = slots
    state.plan.fill_(PlanCode.STATIC)
    state.plan[full] = PlanCode.WARMUP
    for _ in range(full[-1] + 3):
        decide(state, None)
    state.values[ls.WEIGHTS :] = 7.0
    parameters = [order, encoder_order, 1e-2, 0.5, LAST]
    return state, torch.tensor(parameters, dtype=torch.float64, device=device)


@given(
    gaps=st.lists(st.integers(1, 5), min_size=0, max_size=11),
    slots=st.integers(1, 8),
    order=st.integers(0, MAX_ORDER),
    encoder_order=st.integers(0, MAX_ORDER),
)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_both_implementations_agree_bit_for_bit_as_the_ring_wraps(
    gaps, slots, order, encoder_order
):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = np.cumsum([0, *gaps]).tolist()
    states = []
    for impl in ("triton", "reference"):
        state, parameters = decided(device, full, slots, order, encoder_order)
        spectrum_weights(state, parameters, impl=impl)
        states.append(state)
    bits = [state.values.view(torch.int32).tolist() for state in states]
    assert bits[0] == bits[1]
    steps = tuple(full[::-1][:slots])
    for degree, weights in ((order, states[0].weights), (encoder_order, states[0].encoder_weights)):
        if degree == 0:
            assert weights.tolist() == [7.0] * 8
            continue
        expected = np.zeros(8)
        for m, w in enumerate(fitted(steps, full[-1] + 2, degree, 1e-2, 0.5)):
            expected[(len(full) - 1 - m) % slots] = w
        assert weights.tolist() == pytest.approx(expected, abs=1e-5)


def test_rejects_parameters_that_do_not_fit():
    state = LaneState.allocate(1, "cpu")
    with pytest.raises(
        ValueError, match=r"parameters must be float64 \(5,\) on cpu, got torch.float32"
    ):
        spectrum_weights(state, torch.zeros(5))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_the_op_is_registered_right(device, impl):
    state, parameters = decided(device, [0, 1, 3, 4], 4, 2, 1)
    args = (*state.tensors(), parameters, impl)
    torch.library.opcheck(torch.ops.dbcache.spectrum_weights.default, args)
    compiled = state.clone()
    spectrum_weights(state, parameters, impl=impl)
    torch.compiler.reset()
    torch.compile(spectrum_weights, fullgraph=True, backend="eager")(
        compiled, parameters, impl=impl
    )
    assert torch.equal(compiled.values, state.values)
