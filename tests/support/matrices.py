"""Which combinations of a test's parameters run by default: those that cover pairs, or values.

A test marked ``covering`` runs each pair of values of two parameters at least once, and one marked
``covering(1)`` each value; the other combinations get the marker ``full``. Most faults that depend
on parameters depend on two of them (Kuhn, Wallace and Gallo 2004, "Software fault interactions").
"""

from collections import Counter, defaultdict
from itertools import combinations

import pytest


def mark_what_is_full(items):
    """Add ``full`` to the items of a matrix that are left out by default."""
    matrices = defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("covering")
        if marker is not None:
            test = item.nodeid.partition("[")[0]
            matrices[(test, *marker.args)].append(item)
    for (_, *strength), cases in matrices.items():
        values = [{k: repr(v) for k, v in item.callspec.params.items()} for item in cases]
        kept = covering(values, *strength)
        for i, item in enumerate(cases):
            if i not in kept:
                item.add_marker(pytest.mark.full)


def covering(cases, strength=2):
    """Return the places of cases that cover every combination of `strength` values there is.

    Greedy, and among equals those whose values were taken least.

    Args:
        cases: per case the value of each parameter.
        strength: how many values a combination has.
    """
    covers = [set(combinations(sorted(case.items()), strength)) for case in cases]
    missing, kept, taken = set().union(*covers), set(), Counter()
    while missing:
        best = max(
            (i for i in range(len(cases)) if i not in kept),
            key=lambda i: (len(covers[i] & missing), -sum(taken[x] for x in cases[i].items()), -i),
        )
        kept.add(best)
        missing -= covers[best]
        taken.update(cases[best].items())
    return kept
