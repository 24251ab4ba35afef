"""Which calls to run in full: simulated annealing over masks, from several starts.

Starts are evenly spread masks, a dynamic program over pairs of full calls, and masks that are
given (what a policy chose, the row before). A move shifts a full call by one to three places,
exchanges it for any cached one, or, where branches may differ, shifts one from one branch to
another. Each is scored with the weights that are best for it (`Problem.score`), which takes about
a millisecond.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dbcache.tuning.errors import Lane
from dbcache.tuning.problem import Fit, Mask, Masks, Problem

LARGEST_GAP = 24
"""Most cached calls in a row that the dynamic program looks at, and one."""

HOT = 0.3
"""Temperature at the start, in the logarithm of the objective."""


@dataclass(frozen=True)
class Found:
    """Masks, and the logarithm of what their best weights leave."""

    score: float
    masks: Masks


class Search:
    """Looks for masks of one number of full calls.

    Args:
        problem: the measured errors.
        fit: how weights are fitted.
        per_branch: whether guidance branches may have masks of their own.
        seed: of the moves.
    """

    def __init__(self, problem: Problem, fit: Fit, *, per_branch: bool = False, seed: int = 0):
        self.problem, self.fit = problem, fit
        self.groups = _groups(problem.calls, per_branch)
        self.random = np.random.default_rng(seed)

    def run(
        self,
        full: Sequence[int],
        starts: Iterable[Sequence[Mask]] = (),
        *,
        seconds: float,
        moves: int | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> Found:
        """Return the best masks that were found.

        Args:
            full: full calls of each group of lanes (`groups`).
            starts: masks per group to begin with, of any number of full calls.
            seconds: to take at most; the first start is scored in any case.
            moves: to make at most from all starts together; None: as the time allows.
            tick: called after each start.
        """
        begun = [self._fitted(start, full) for start in starts]
        begun += [[even(n, count) for n, count in zip(self._lengths(), full, strict=True)]]
        best = [min(((self._score(x), x) for x in begun), key=lambda pair: pair[0])]
        order = sorted(((self._score(x), x) for x in begun), key=lambda pair: pair[0])
        chosen = order[: 3 if len(order) > 2 else len(order)]
        end = time.perf_counter() + seconds
        for turn, (_, start) in enumerate(chosen):
            until = time.perf_counter() + (end - time.perf_counter()) / (len(chosen) - turn)
            most = None if moves is None else max(1, moves // len(chosen))
            best.append(self._anneal(start, until, most))
            tick()
        score, masks = min(best, key=lambda pair: pair[0])
        return Found(score, self._spread(masks))

    def _lengths(self) -> list[int]:
        return [self.problem.calls[group[0]] for group in self.groups]

    def _spread(self, masks: Sequence[Mask]) -> Masks:
        return {
            lane: mask for group, mask in zip(self.groups, masks, strict=True) for lane in group
        }

    def _score(self, masks: Sequence[Mask]) -> float:
        spread = self._spread(masks)
        return self.problem.score(spread, self.fit) if self.problem.is_allowed(spread) else math.inf

    def _fitted(self, masks: Sequence[Mask], full: Sequence[int]) -> list[Mask]:
        """Return masks with as many full calls as asked, the least harmful ones changed."""
        current = [tuple(mask) for mask in masks]
        for index, count in enumerate(full):
            while sum(current[index]) != count:
                missing = sum(current[index]) < count
                options = []
                for call in range(1, len(current[index])):
                    if current[index][call] != int(missing):
                        other = list(current)
                        other[index] = _with(current[index], {call: int(missing)})
                        options.append((self._score(other), other))
                current = min(options, key=lambda pair: pair[0])[1]
        return current

    def _anneal(
        self, start: list[Mask], until: float, moves: int | None
    ) -> tuple[float, list[Mask]]:
        current, score = list(start), self._score(start)
        best, best_score = current, score
        begun = time.perf_counter()
        made = 0
        while True:
            share = (time.perf_counter() - begun) / max(until - begun, 1e-9)
            share = share if moves is None else max(share, made / moves)
            if share >= 1:
                return best_score, best
            made += 1
            other = self._moved(current)
            if other is None:
                continue
            new = self._score(other)
            heat = HOT * (1 - share) ** 2 + 1e-9
            if new < score or self.random.random() < math.exp(min(0.0, (score - new) / heat)):
                current, score = other, new
                if score < best_score:
                    best, best_score = current, score

    def _moved(self, masks: list[Mask]) -> list[Mask] | None:
        """Return masks that differ by one move; None where the move drawn is not possible."""
        random = self.random
        index = int(random.integers(len(masks)))
        into = index
        if len(masks) > 1 and random.random() < 0.3:
            into = int(random.integers(len(masks)))
        full = [call for call in range(1, len(masks[index])) if masks[index][call]]
        if not full:
            return None
        old = full[int(random.integers(len(full)))]
        near = range(old - 3, old + 4) if random.random() < 0.7 else range(len(masks[into]))
        free = [call for call in near if 0 < call < len(masks[into]) and not masks[into][call]]
        if not free:
            return None
        other = list(masks)
        other[index] = _with(other[index], {old: 0})
        other[into] = _with(other[into], {free[int(random.integers(len(free)))]: 1})
        return other


def _groups(calls: dict[Lane, int], per_branch: bool) -> list[list[Lane]]:
    """Return the lanes that share a mask: the branches of a transformer, or each by itself."""
    if per_branch:
        return [[lane] for lane in calls]
    groups: dict[tuple[int, int], list[Lane]] = {}
    for lane, count in calls.items():
        groups.setdefault((lane[0], count), []).append(lane)
    return list(groups.values())


def even(calls: int, full: int) -> Mask:
    """Return a mask of `full` evenly spread full calls, the first and the last among them."""
    places = {round(x) for x in np.linspace(0, calls - 1, full)}
    return tuple(int(call in places) for call in range(calls))


def _with(mask: Mask, changes: dict[int, int]) -> Mask:
    return tuple(changes.get(call, full) for call, full in enumerate(mask))


def shared_out(groups: Sequence[int], full: int) -> list[int]:
    """Return how many full calls each group gets, in proportion to its calls, at least 1."""
    total = sum(groups)
    exact = [full * calls / total for calls in groups]
    found = [max(1, math.floor(x)) for x in exact]
    by_rest = sorted(range(len(groups)), key=lambda i: found[i] - exact[i])
    for i in by_rest:
        if sum(found) < full and found[i] < groups[i]:
            found[i] += 1
    return found


def dynamic_program(problem: Problem, lane: Lane, mu: float) -> dict[int, Mask]:
    """Return the best mask of a lane per number of full calls, gap by gap.

    The path is over pairs of full calls: with p and c the two latest ones, what is left of the gap
    up to the next one n is |sum e_t|^2 + mu sum |e_t|^2 over c < t < n, each call t with the best
    weights of residuals c and p. What gaps leave is added up, as if it never cancelled.
    """
    calls, gram = problem.calls[lane], problem.gram
    best: dict[tuple[int, int | None, int], tuple[float, tuple[int, ...]]] = {}
    best[1, None, 0] = (0.0, (0,))
    final: dict[int, tuple[float, tuple[int, ...]]] = {}
    for newer in range(calls):
        states = [(key, value) for key, value in best.items() if key[2] == newer]
        by_older: dict[int | None, list[float]] = {}
        for (count, older, _), (cost, path) in states:
            if older not in by_older:
                by_older[older] = _gap_costs(problem, gram, lane, older, newer, mu)
            gaps = by_older[older]
            for length, gap in enumerate(gaps):
                following = newer + 1 + length
                value = (cost + gap, (*path, following))
                if following >= calls:
                    _keep(final, count, (cost + gap, path))
                    continue
                _keep(best, (count + 1, newer, following), value)
    masks = {}
    for count, (_, path) in final.items():
        masks[count] = tuple(int(call in path) for call in range(calls))
    return masks


def _keep(table: dict, key: object, value: tuple[float, tuple[int, ...]]) -> None:
    if key not in table or value[0] < table[key][0]:
        table[key] = value


def _gap_costs(
    problem: Problem, gram: np.ndarray, lane: Lane, older: int | None, newer: int, mu: float
) -> list[float]:
    """Return what is left of a gap of 0, 1, 2, ... cached calls after `newer`."""
    costs, rows, factors, single = [0.0], [], [], 0.0
    last = min(problem.calls[lane] - 1, newer + LARGEST_GAP)
    for call in range(newer + 1, last + 1):
        near, far = problem.triple(lane, older, newer, call)
        if near < 0:
            break
        weight = 0.0
        if far >= 0:
            spread = gram[far, far] - 2 * gram[far, near] + gram[near, near]
            weight = (gram[near, near] - gram[far, near]) / spread if spread > 0 else 0.0
        own = [(near, 1 - weight)] + ([(far, weight)] if far >= 0 else [])
        index = [row for row, _ in own]
        factor = np.array([x for _, x in own])
        single += mu * float(factor @ gram[np.ix_(index, index)] @ factor)
        rows += index
        factors += [x for _, x in own]
        together = np.array(factors)
        costs.append(float(together @ gram[np.ix_(rows, rows)] @ together) + single)
    return costs
