"""Matrices of parameters that run in part: what is left out adds no pair, or no value."""

from itertools import combinations, product

import pytest
from matrices import covering

CASES = [dict(zip("abcd", case, strict=True)) for case in product(range(6), range(3), "xy", "pq")]


@pytest.mark.parametrize(("strength", "most"), [(1, 6), (2, 20)])
def test_every_combination_of_so_many_values_is_among_a_few_cases(strength, most):
    kept = [CASES[i] for i in covering(CASES, strength)]
    assert len(kept) <= most < len(CASES) == 72
    whole, part = (
        {values for case in cases for values in combinations(sorted(case.items()), strength)}
        for cases in (CASES, kept)
    )
    assert part == whole


def test_among_equals_values_are_taken_in_turn():
    cases = [{"model": i, "setting": k} for i in range(30) for k in "abc"]
    kept = [cases[i]["setting"] for i in covering(cases, 1)]
    assert {kept.count(setting) for setting in "abc"} == {10}


def test_parameters_that_hang_together_lose_no_case():
    cases = [{"policy": i, "threshold": i / 2} for i in range(5)]
    assert covering(cases) == set(range(5))
