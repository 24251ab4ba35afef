"""Rows improved in closed loop: in the real pipeline, where an error meets all later steps.

A search goes by the sum of the errors of the cached calls. What pictures really differ by is what
later steps make of these. So masks with one full call elsewhere are tried, the one of the best
score first, and kept where the pictures of the calibration come closer.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from dbcache.tuning.pictures import Draw
from dbcache.tuning.problem import Mask, Masks, Problem
from dbcache.tuning.progress import Progress
from dbcache.tuning.rows import Row, Runner

REACH = 2
"""Calls by which a full call is moved, at most."""


class ClosedLoop:
    """Improves rows.

    Args:
        runner: draws.
        problem: the measured errors.
        draws: of the calibration, by which rows are chosen.
        progress: the time.
    """

    def __init__(
        self, runner: Runner, problem: Problem, draws: Sequence[Draw], progress: Progress
    ) -> None:
        self.runner, self.problem, self.progress = runner, problem, progress
        self.draws = list(draws)

    def quality(self, row: Row) -> float:
        """Return the mean PSNR of the pictures under a row, in dB."""
        values = [x for draw in self.draws for x in self.runner.run(row, draw)[0]]
        return statistics.mean(min(x, 200.0) for x in values)

    def improve(self, row: Row, seconds: float, cost: float) -> Row:
        """Return the row, or one with as many full calls and closer pictures.

        Args:
            row: fitted, with `chosen` and `fit`.
            seconds: to take at most.
            cost: seconds of a draw under the row.
        """
        end = self.progress.spent + seconds
        tried = {_key(row.masks)}
        while self.progress.spent + len(self.draws) * cost < end:
            masks = next((m for m in self._moves(row) if _key(m) not in tried), None)
            if masks is None:
                break
            tried.add(_key(masks))
            other = Row(masks, self.problem.weights(masks, row.fit), fit=row.fit)
            other.chosen = self.quality(other)
            if other.chosen > row.chosen:
                row = other
        return row

    def _moves(self, row: Row) -> Iterator[Masks]:
        """Return masks with one full call moved, in all lanes of that mask, the best one first."""
        options = []
        for mask in sorted(set(row.masks.values())):
            lanes = [lane for lane, own in row.masks.items() if own == mask]
            for moved in _moved(mask):
                masks = {**row.masks, **dict.fromkeys(lanes, moved)}
                if self.problem.is_allowed(masks):
                    options.append((self.problem.score(masks, row.fit), masks))
        yield from (masks for _, masks in sorted(options, key=lambda pair: pair[0]))


def _moved(mask: Mask) -> Iterator[Mask]:
    for call in range(1, len(mask)):
        for other in range(max(1, call - REACH), min(len(mask), call + REACH + 1)):
            if mask[call] and not mask[other]:
                changed = list(mask)
                changed[call], changed[other] = 0, 1
                yield tuple(changed)


def _key(masks: Masks) -> tuple[Mask, ...]:
    return tuple(masks.values())
