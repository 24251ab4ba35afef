"""Weights of the predictors against their definitions in float64."""

from itertools import pairwise
from math import factorial, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.common.lane_state import Predictor
from dbcache.kernels.common.sums import f32
from dbcache.kernels.prediction.taylor import taylor_weights


def ladder(snapshots, ages, order):
    """TaylorSeer as it is told: differences of differences, then the series, in float64."""
    differences, row = [], list(snapshots[: len(ages)])
    last = min(order, len(ages) - 1)
    for i in range(last + 1):
        differences.append(row[0])
        if i < last:
            pairs = enumerate(pairwise(row))
            row = [(new - old) / (ages[m + 1] - ages[m]) for m, (new, old) in pairs]
    total, factor = 0.0, 1.0
    for i, difference in enumerate(differences):
        if i:
            factor *= ages[0] / i
        total += factor * difference
    return total


@given(
    gaps=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    order=st.integers(0, 7),
    snapshots=st.lists(st.floats(-10, 10), min_size=8, max_size=8),
)
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
def test_weights_are_the_taylor_ladder(gaps, order, snapshots):
    ages = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    weights = taylor_weights(ages, order)
    assert len(weights) == min(order, len(ages) - 1) + 1
    total = sum(w * y for w, y in zip(weights, snapshots, strict=False))
    scale = sum(abs(w) for w in weights) * 10
    assert total == pytest.approx(ladder(snapshots, ages, order), abs=1e-5 * scale)


@pytest.mark.parametrize(
    ("ages", "order", "weights"),
    [
        ([1], 4, [1.0]),
        ([3, 5], 0, [1.0]),
        ([1, 2], 1, [2.0, -1.0]),
        ([3, 5], 1, [2.5, -1.5]),
        ([1, 2, 3], 1, [2.0, -1.0]),
        ([1, 2, 3], 2, [2.5, -2.0, 0.5]),
        ([2, 3, 5], 2, [5.0, -5.0, 1.0]),
    ],
    ids=str,
)
def test_weights_by_hand(ages, order, weights):
    assert taylor_weights(ages, order) == weights


def test_first_order_predicts_straight_lines_exactly():
    ages = [2, 4, 9]
    weights = taylor_weights(ages, 1)
    assert sum(w * (3 - 2 * age) for w, age in zip(weights, ages, strict=False)) == 3.0


def lagrange(ages, order):
    """Weights of the polynomial through the newest snapshots, in float64."""
    nodes = ages[: order + 1]
    return [
        prod(other / (other - age) for m, other in enumerate(nodes) if m != j)
        for j, age in enumerate(nodes)
    ]


@given(gaps=st.lists(st.integers(1, 9), min_size=1, max_size=8), order=st.integers(0, 4))
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_newton_weights_are_lagranges_and_exact_on_polynomials(gaps, order):
    ages = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    weights = taylor_weights(ages, order, Predictor.NEWTON)
    scale = sum(abs(w) for w in weights)
    assert weights == pytest.approx(lagrange(ages, order), abs=1e-5 * scale)
    for degree in range(len(weights)):
        values = [(1 - age / ages[-1]) ** degree for age in ages]  # 1 at age 0
        total = sum(w * y for w, y in zip(weights, values, strict=False))
        assert total == pytest.approx(1, abs=1e-5 * scale)


@given(
    gaps=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    order=st.integers(0, 4),
    sigma=st.sampled_from([0.3, 0.5, 1.0]),
    snapshots=st.lists(st.floats(-10, 10), min_size=8, max_size=8),
)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_hermite_weights_are_the_series_in_hermite_polynomials(gaps, order, sigma, snapshots):
    ages = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    weights = taylor_weights(ages, order, Predictor.HERMITE, f32(2 * sigma**2))
    row, expected, size = snapshots[: len(ages)], 0.0, 0.0
    for i in range(len(weights)):
        x = sigma * ages[0]
        hermite = [1, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x, 16 * x**4 - 48 * x**2 + 12][i]
        term = sigma**i * hermite / factorial(i)
        expected, size = expected + term * row[0], size + abs(term) * 10 * 2**i
        row = [(new - old) / (ages[m + 1] - ages[m]) for m, (new, old) in enumerate(pairwise(row))]
    total = sum(w * y for w, y in zip(weights, snapshots, strict=False))
    scale = size + sum(abs(w) for w in weights) * 10
    assert total == pytest.approx(expected, abs=1e-5 * scale)


@given(
    gaps=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    horizon=st.sampled_from([0.25, 0.5, 1.0, 3.0, 1e9]),
)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_foca_weights_follow_the_parabolas_slope_as_far_as_the_horizon(gaps, horizon):
    ages = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    weights = taylor_weights(ages, 2, Predictor.FOCA, horizon)
    k, scale = ages[0], sum(abs(w) for w in weights)
    times = [-(age - k) for age in ages[:3]]  # since the newest snapshot
    assert sum(weights) == pytest.approx(1, abs=1e-5 * scale)
    if len(ages) == 1:
        return
    # straight lines are exact; of t^2 the slope at 0 is 0 and that of the last gap is -gap
    line = sum(w * t for w, t in zip(weights, times, strict=True))
    assert line == pytest.approx(k, abs=1e-5 * scale * ages[-1])
    if len(ages) > 2:
        gap = ages[1] - ages[0]
        square = sum(w * t**2 for w, t in zip(weights, times, strict=True))
        expected = -gap * (k - min(k, horizon * gap))
        assert square == pytest.approx(expected, abs=1e-5 * scale * ages[2] ** 2)
