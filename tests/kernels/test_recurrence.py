"""The linear recurrence: its fit and its weights against NumPy, and both implementations."""

from math import nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState, PlanCode
from dbcache.kernels.common.launches import BLOCK
from dbcache.kernels.common.sums import partition_of
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.prediction.fit_recurrence import fit_recurrence
from dbcache.kernels.prediction.recurrence import continued, recurrence_weights

IMPLS = ["triton", "reference"]
BASES = [
    (0.9, 0.7), (1.1, 0.95), (0.8, -0.3), (-0.5, -0.2), (0.6, 0.6), (1.0, 1.0), (1.0, 0.0),
    (0.9 + 0.3j, 0.9 - 0.3j), (-0.2 + 0.8j, -0.2 - 0.8j),
]  # fmt: skip
FULL = [[0, 1, 2], [0, 3, 8, 13], [0, 1, 2, 3, 7, 11, 15], [0, 2, 4, 6, 8]]


def recurrence(a, b):
    """Return (alpha, gamma) of the recurrence with the roots a and b."""
    alpha = (a * b).real
    return alpha, (a + b).real - 1 - alpha


@pytest.mark.covering
@pytest.mark.parametrize("gap", [1, 2, 3, 5, 12])
@pytest.mark.parametrize(("a", "b"), BASES, ids=str)
def test_weights_are_the_fractional_power_of_the_companion_matrix(a, b, gap):
    alpha, gamma = recurrence(a, b)
    for steps in (1, 2, 3, 4, 7, 11):
        weights = continued([steps, steps + gap], alpha, gamma)
        if a == b or b == 0:  # no eigenvectors, or no inverse: the limit
            q = steps / gap
            expected = [(q + 1) * a**q, -q * a ** (q + 1)] if a == b else [a**q, 0.0]
        else:
            roots = np.array([a, b], dtype=complex)
            vectors = np.stack([roots, np.ones(2)])  # of the companion matrix
            power = vectors @ np.diag(roots ** (steps / gap)) @ np.linalg.inv(vectors)
            expected = power[0].real
        assert weights == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("fit", [(nan, nan), (nan, 0.0), (1.0, nan), (5.0, 0.0), (1.0, 3.0)])
def test_without_a_usable_fit_the_weights_are_the_straight_line(fit):
    assert continued([2, 6, 10], *fit) == [1.5, -0.5]
    assert continued([2], *fit) == [1.0]


def lane(device, full, slots):
    """Return the state of a lane with full steps at `full`, and the slot of each."""
    state = LaneState.allocate(full[-1] + 16, device)
    state.limits[ls.SLOTS] = slots
    state.plan.fill_(PlanCode.STATIC)
    state.plan[full] = PlanCode.WARMUP
    where = {}
    for step in range(full[-1] + 1):
        decide(state, None, impl="reference")
        where[step] = int(state.counters[ls.SLOT])
    return state, [where[step] for step in full]


def exponentials(steps, size=300):
    """Return snapshots of sum of two exponentials with random coefficients, (len(steps), size)."""
    coefficients = np.random.default_rng(0).normal(size=(2, size))
    times = np.asarray(steps, dtype=float)[:, None]
    return coefficients[0] * 0.97**times + coefficients[1] * 0.8**times


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("slots", [3, 6])
def test_exponentials_are_predicted_between_and_beyond_snapshots(device, full, slots, impl):
    state, where = lane(device, full, slots)
    ring = torch.full((slots, 300), nan, device=device)
    for step, slot in zip(full, where, strict=True):
        ring[slot] = torch.tensor(exponentials([step])[0], dtype=torch.float32)
    fit = torch.full((2,), 7.0, dtype=torch.float64, device=device)
    fit_recurrence(ring, state, fit, ridge=1e-9, impl=impl)
    for ahead in range(1, 5):
        decide(state, None, impl="reference")
        recurrence_weights(state, fit, fit, impl=impl)
        assert torch.equal(state.weights, state.encoder_weights)
        weights = state.weights[:slots].double().cpu().numpy()
        used = np.nan_to_num(ring.double().cpu().numpy())
        predicted = weights @ used
        expected = exponentials([full[-1] + ahead])[0]
        assert np.abs(predicted - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 3, BLOCK - 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_the_fit_is_the_regularised_least_squares_solution(
    random, device, impl, dtype, size, ridge
):
    full, slots = [0, 2, 4, 6, 8, 10], 5
    state, where = lane(device, full, slots)
    ring = random(slots, size, dtype=dtype) if size > 1 else random(slots, 1, dtype=dtype)
    fit = torch.full((2,), nan, dtype=torch.float64, device=device)
    fit_recurrence(ring, state, fit, ridge=ridge, impl=impl)
    y = [ring[where[-1 - m]].double().cpu().numpy() for m in range(5)]
    rows, targets = [], []
    for i in range(1, 4):
        rows.append(np.stack([y[i] - y[i + 1], y[i]], axis=1))
        targets.append(y[i - 1] - y[i])
    matrix, target = np.concatenate(rows), np.concatenate(targets)
    norms = np.sqrt(ridge) * np.linalg.norm(matrix, axis=0)
    matrix = np.concatenate([matrix, np.diag(norms)])
    expected = np.linalg.lstsq(matrix, np.append(target, [norms[0], 0.0]), rcond=None)[0]
    assert fit.cpu().numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["two", "uneven", "nothing moves", "not finite"])
def test_snapshots_that_tell_nothing_give_no_fit(random, device, impl, case):
    full = {"two": [0, 1], "uneven": [0, 1, 5]}.get(case, [0, 1, 2])
    state, _ = lane(device, full, 3)
    ring = random(3, 40)
    if case == "nothing moves":
        ring[:] = ring[0].clone()
    if case == "not finite":
        ring[1, 7] = nan
    fit = torch.zeros(2, dtype=torch.float64, device=device)
    fit_recurrence(ring, state, fit, impl=impl)
    assert fit.isnan().all()


def test_programs_that_share_the_work_add_up_to_the_same(random, device, monkeypatch):
    """More blocks than programs, and the ticket is 0 again after each launch."""
    monkeypatch.setattr("dbcache.kernels.common.sums.MAX_PARTIALS", 2)
    state, _ = lane(device, [0, 1, 2], 3)
    ring = random(3, 5 * BLOCK + 3)
    assert partition_of(ring[0].numel()) == (3, 2)
    fits = [torch.zeros(2, dtype=torch.float64, device=device) for _ in range(3)]
    for fit, impl in zip(fits, ("triton", "triton", "reference"), strict=True):
        fit_recurrence(ring, state, fit, ridge=0.1, impl=impl)
        assert state.counters[ls.TICKET] == 0
    assert torch.equal(fits[0], fits[1])
    assert fits[0].tolist() == pytest.approx(fits[2].tolist(), rel=1e-4)


@given(
    full=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    slots=st.integers(1, 8),
    alpha=st.floats(-1.5, 2.5),
    gamma=st.floats(-1, 1),
    ahead=st.integers(1, 9),
)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_both_implementations_agree_bit_for_bit(full, slots, alpha, gamma, ahead):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state, _ = lane(device, np.cumsum(full).tolist(), slots)
    for _ in range(ahead):
        decide(state, None, impl="reference")
    fit = torch.tensor([alpha, gamma], dtype=torch.float64, device=device)
    bits = []
    for impl in IMPLS:
        state.values[ls.WEIGHTS :] = 7.0
        recurrence_weights(state, fit, impl=impl)
        bits.append(state.values.view(torch.int32).tolist())
        assert state.encoder_weights.tolist() == [7.0] * 8
    assert bits[0] == bits[1]


def test_rejects_what_does_not_fit():
    state, fit = LaneState.allocate(1, "cpu"), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"ring must be contiguous .* got \(9, 4\)"):
        fit_recurrence(torch.zeros(9, 4), state, fit)
    with pytest.raises(ValueError, match=r"fit must be float64 \(2,\), got torch.float32"):
        fit_recurrence(torch.zeros(3, 4), state, fit.float())
    with pytest.raises(ValueError, match="ridge must be at least 0, got -1"):
        fit_recurrence(torch.zeros(3, 4), state, fit, ridge=-1)
    with pytest.raises(ValueError, match=r"a fit must be float64 \(2,\) on cpu, got torch.float32"):
        recurrence_weights(state, fit.float())


@pytest.mark.parametrize("impl", IMPLS)
def test_the_ops_are_registered_right(random, device, impl):
    state, _ = lane(device, [0, 1, 2], 3)
    ring, fit = random(3, 40), torch.zeros(2, dtype=torch.float64, device=device)
    ops = torch.ops.dbcache
    torch.library.opcheck(ops.fit_recurrence.default, (ring, state.counters, fit, 0.5, impl))
    args = (*state.tensors(), fit, None, impl)
    torch.library.opcheck(ops.recurrence_weights.default, args)

    def both(state, ring, fit):
        fit_recurrence(ring, state, fit, ridge=0.5, impl=impl)
        recurrence_weights(state, fit, impl=impl)

    compiled_state, compiled_fit = state.clone(), fit.clone()
    both(state, ring, fit)
    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    compiled(compiled_state, ring, compiled_fit)
    assert torch.equal(compiled_fit, fit)
    assert torch.equal(compiled_state.values, state.values)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLS)
def test_a_slot_that_begins_past_the_end_of_32_bits_is_addressed(device, impl):
    state, where = lane(device, [0, 1, 2], 3)
    size = 2**30 + 4096
    ring = torch.zeros(3, size, device=device, dtype=torch.float16)
    for slot, value in zip(where, (4.0, 2.0, 1.0), strict=True):
        ring[slot, -4096:] = value
    fit = torch.zeros(2, dtype=torch.float64, device=device)
    fit_recurrence(ring, state, fit, ridge=1e-6, impl=impl)
    decide(state, None)
    recurrence_weights(state, fit, impl=impl)
    assert (state.weights[:3] @ ring[:, -1].float()).item() == pytest.approx(0.5, rel=1e-3)
