"""The phases of `tune`: calibrate, search, choose in closed loop, validate on other pictures."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import dbcache
from dbcache.tuning.closed_loop import ClosedLoop
from dbcache.tuning.errors import measure_pairs
from dbcache.tuning.pictures import Draw
from dbcache.tuning.problem import Fit, Mask, Masks, Problem
from dbcache.tuning.progress import Progress, quietly
from dbcache.tuning.recording import Store, record
from dbcache.tuning.rows import Row, Runner, frame_of, front, levels
from dbcache.tuning.search import Search, dynamic_program, shared_out

CALIBRATE, SEARCH, CHOOSE, TIME = 0.45, 0.6, 0.75, 0.85
"""Shares of the budget at which the phases end; more times than the least are taken until TIME.

The rest is for pictures held out, and for other numbers of full steps where a target is missed.
"""

POLICIES = (("easycache", 0.02), ("easycache", 0.05), ("easycache", 0.1), ("dbcache", 0.2))
"""Policies and thresholds whose choices are starts of the search."""

MOST_SECONDS, SHORT = 20.0, 2.0
"""Of the search for one row, and of one that only asks how many full steps a quality takes."""

LEAST_TIMES, MOST_TIMES = 3, 9
"""Interleaved times of which the median is the speed-up of a row: more where they disagree."""

AGREED = 0.05
"""Largest spread of the middle half of the times over the median."""


@dataclass(frozen=True)
class Wanted:
    """What was asked for, one or more of the three, or none: a front."""

    speedups: tuple[float, ...] = ()
    psnrs: tuple[float, ...] = ()
    full: tuple[int, ...] = ()


class Tuner:
    """Tunes one number of steps.

    Args:
        target: what is enabled.
        calibration, validation: draws; those to validate with are not calibrated on.
        steps: `num_inference_steps`, None where the draws say it.
        fit: how weights are fitted.
        predictors: "auto", "weights" or "foca".
        per_branch: whether guidance branches get masks of their own.
        guard: whether the changes of the steps are kept.
        progress: time and words.
    """

    def __init__(
        self,
        target: Any,
        calibration: Sequence[Draw],
        validation: Sequence[Draw],
        *,
        steps: int | None,
        fit: Fit,
        predictors: str,
        per_branch: bool,
        guard: bool,
        store: str,
        progress: Progress,
    ) -> None:
        self.target = target
        self.calibration, self.validation = list(calibration), list(validation)
        self.steps, self.fit, self.predictors = steps, fit, predictors
        self.per_branch, self.guard = per_branch, guard
        self.progress = progress
        self.store = Store(store, progress.say)
        self.problem = Problem()
        self.rows: dict[int, Row] = {}
        self._made: dict[int, Row] = {}
        self._dp: dict[int, Mask] = {}
        self._starts: list[list[Mask]] = []
        self._used: list[Draw] = []

    # --- calibrate ----------------------------------------------------------------------------

    def calibrate(self, models: Sequence[str]) -> None:
        """Record pictures and measure their errors, as many as the budget allows."""
        progress = self.progress
        for number, draw in enumerate(self.calibration):
            begun = progress.spent
            recorded = record(self.target, draw, self.store)
            drawn = progress.spent - begun
            if number == 0:
                steps = self.steps or len(recorded.steps) or _calls(recorded)
                frame = frame_of(self.target, recorded, models, steps, self.fit.snapshots)
                self.runner = Runner(self.target, frame)
                self.draw_seconds = drawn
            self.runner.remember(draw, recorded.output)
            self.problem.add(measure_pairs(self.target, recorded))
            self._used.append(draw)
            took = progress.spent - begun
            progress.bar(f"calibrated on {number + 1} of {len(self.calibration)}")
            if not progress.allows(took, CALIBRATE):
                break
        progress.say(
            f"calibrated on {len(self._used)} of {len(self.calibration)} draws in "
            f"{progress.spent:.0f} s"
        )
        lanes = self.problem.calls
        self.total = _longest(lanes)
        first = next(iter(lanes))
        if len({lane[0] for lane in lanes}) == 1:
            self._dp = dynamic_program(self.problem, first, self.fit.mu)
        if progress.allows(2 * len(POLICIES) * self.draw_seconds, CALIBRATE + 0.05):
            self._ask_policies()
        self._time_ends()
        self.loop = ClosedLoop(self.runner, self.problem, self._used[:2], progress)

    @quietly()
    def _ask_policies(self) -> None:
        """Keep which calls policies run in full on the first picture."""
        for policy, threshold in POLICIES:
            dbcache.enable(
                self.target,
                policy=policy,
                residual_diff_threshold=threshold,
                max_warmup_steps=3,
                enable_foca=True,
                enable_encoder_foca=True,
            )
            try:
                self._used[0](self.target)
                lanes = dbcache.summary(self.target, logging=False).lanes
                chosen = [
                    tuple(int(call not in lane.cached_steps) for call in range(lane.steps))
                    for lane in lanes
                ]
            finally:
                dbcache.disable(self.target)
            groups = Search(self.problem, self.fit).groups
            fitting = [
                [mask for mask in chosen if len(mask) == self.problem.calls[group[0]]]
                for group in groups
            ]
            if all(fitting):
                self._starts.append([masks[0] for masks in fitting])
            self.progress.bar(f"asked {policy}")

    def _time_ends(self) -> None:
        """Time a plain draw and one with a single full step, between which all rows lie."""
        draw = self._used[0]
        only = {lane: (1,) + (0,) * (count - 1) for lane, count in self.problem.calls.items()}
        plain, least = [], []
        for _ in range(2):
            plain.append(self.runner.plain(draw))
            least.append(self.runner.run(Row(only, {}), draw)[1])
        self.draw_seconds, self._least = min(plain), min(least)

    def seconds_of(self, full: float) -> float:
        """Return the seconds of a draw with so many full steps, as the two ends tell."""
        share = (full - 1) / max(1, self.total - 1)
        return self._least + share * (self.draw_seconds - self._least)

    def full_for(self, speedup: float) -> int:
        """Return the most full steps with which a draw should be so much faster; 1 at least."""
        for full in range(self.total, 1, -1):
            if self.draw_seconds >= speedup * self.seconds_of(full):
                return full
        return 1

    # --- search -------------------------------------------------------------------------------

    def made(self, counts: Sequence[int], later: int = 0) -> list[Row]:
        """Return the rows of these numbers of full steps, searched and chosen, each once.

        Args:
            counts: of full steps.
            later: rows for which time is left.
        """
        missing = [count for count in counts if count not in self._made]
        parts = max(1, len(missing) + later)
        seconds = max(0.5, min(MOST_SECONDS, self.progress.left(SEARCH) / parts))
        for count in missing:
            self.row_of(count, seconds)
        self._mend_order()
        for number, count in enumerate(missing):
            row, cost = self.rows[count], self.seconds_of(count)
            share = self.progress.left(CHOOSE) / (parts - number)
            end = self.progress.spent + share
            if self.progress.allows(2 * cost, CHOOSE) or self.predictors == "foca":
                row = self.choose(row, cost, share)
            if row.weights and self.predictors != "foca":
                row = self.loop.improve(row, end - self.progress.spent, cost)
            self._made[count] = row
            self.progress.bar(f"tried {count} full steps")
        return [self._made[count] for count in counts]

    def _mend_order(self) -> None:
        """Search anew, from the masks with fewer full steps, where more of them score worse."""
        if self._splits:
            return
        for fewer, more in itertools.pairwise(sorted(self.rows)):
            score = self.problem.score(self.rows[more].masks, self.fit)
            if more in self._made or score <= self.problem.score(self.rows[fewer].masks, self.fit):
                continue
            search = Search(self.problem, self.fit, seed=more)
            start = [self.rows[fewer].masks[group[0]] for group in search.groups]
            counts = [sum(self.rows[more].masks[group[0]]) for group in search.groups]
            found = search.run(counts, [start], seconds=0.5)
            if found.score < score:
                self.rows[more] = self._fitted(found.masks, self.fit)

    def _fitted(self, masks: Masks, fit: Fit) -> Row:
        return Row(masks, self.problem.weights(masks, fit), fit=fit)

    def row_of(self, full: int, seconds: float) -> Row:
        """Return the best row of so many full steps, searched for `seconds` at most, or longer."""
        search = Search(self.problem, self.fit, seed=full)
        lengths = [self.problem.calls[group[0]] for group in search.groups]
        counts = shared_out(
            lengths, full if len(lengths) == 1 else full * sum(lengths) // self.total
        )
        starts = list(self._starts)
        if full in self._dp and len(search.groups) == 1:
            starts.append([self._dp[full]])
        near = min(self.rows, key=lambda other: abs(other - full), default=None)
        if near is not None and not self.per_branch:
            masks = self.rows[near].masks
            starts.append([masks[group[0]] for group in search.groups])
        share = seconds * (0.6 if self._splits else 1.0)
        found = search.run(counts, starts, seconds=share).masks
        if self._splits:
            found = self._split(found, full, seconds - share)
        self.rows[full] = self._fitted(found, self.fit)
        self.progress.bar(f"searched for {full} full steps")
        return self.rows[full]

    def full_of_quality(self, psnr: float) -> int:
        """Return the fewest full steps with that PSNR on the calibration, as a short search says.

        At most all but one: with all of them nothing is cached.
        """
        low, high = 1, max(1, self.total - 1)
        count = max(2, self.total // 3)
        while low < high:
            row = self.row_of(count, max(0.2, min(SHORT, self.progress.left(SEARCH) / 10)))
            low, high = (low, count) if self.loop.quality(row) >= psnr else (count + 1, high)
            if not self.progress.allows(3 * self.seconds_of(count), SEARCH):
                break
            count = (low + high) // 2
        return high

    @property
    def _splits(self) -> bool:
        return self.per_branch and len(self.problem.calls) > 1

    def _split(self, masks: Masks, full: int, seconds: float) -> Masks:
        """Return masks per branch, with as many full calls in all."""
        search = Search(self.problem, self.fit, per_branch=True, seed=full)
        start = [masks[group[0]] for group in search.groups]
        return search.run([sum(mask) for mask in start], [start], seconds=seconds).masks

    def choose(self, row: Row, cost: float, seconds: float) -> Row:
        """Return the row with the predictor that is closest in closed loop.

        Args:
            row: as it was searched.
            cost: seconds of a draw under the row.
            seconds: to take, as long as there is a choice.
        """
        options = [row] if self.predictors != "foca" else [Row(row.masks, {})]
        if self.predictors == "auto" and 4 * len(self.loop.draws) * cost <= seconds:
            fits = [replace(self.fit, ridge=ridge) for ridge in (1e-2, 1e-4)]
            options += [self._fitted(row.masks, fit) for fit in fits]
            options.append(Row(row.masks, {}))  # without weights: FoCa
        for option in options:
            if option.chosen == -math.inf:
                option.chosen = self.loop.quality(option)
        return max(options, key=lambda option: option.chosen)

    # --- validate -----------------------------------------------------------------------------

    def validate(self, rows: Sequence[Row]) -> None:
        """Measure rows on pictures that were held out, interleaved with plain draws."""
        cost = self.draw_seconds + sum(self.seconds_of(row.full) for row in rows)
        turns = max(len(self.validation), MOST_TIMES) if rows else 0
        for turn in range(turns):
            if turn and not self.progress.allows(cost):
                break
            is_enough = turn >= max(len(self.validation), LEAST_TIMES)
            if is_enough and (_agree(rows) or not self.progress.allows(cost, TIME)):
                break
            draw = self.validation[turn % len(self.validation)]
            plain = self.runner.plain(draw)
            for row in rows:
                values, seconds = self.runner.run(row, draw)
                if turn < len(self.validation):
                    row.psnr += values
                row.speedups.append(plain / seconds)
                self.progress.bar(f"validated {row.full:g} full steps")

    def finish(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the content of the file."""
        if self.guard:
            for row in rows:
                self.runner.note_changes(row, self._used[:2])
        kept = front(rows, self.progress.say)
        content = self.runner.content(kept)
        content["levels"] = levels(kept)
        content["calibrated_on"] = self.problem.pictures
        content["validated_on"] = len(self.validation)
        content["held_out"] = not set(map(id, self.validation)) & set(map(id, self._used))
        content["seconds"] = round(self.progress.spent)
        return content


def _agree(rows: Sequence[Row]) -> bool:
    """Whether the times of each row say the same."""
    for row in rows:
        low, middle, high = statistics.quantiles(row.speedups, n=4)
        if high - low > AGREED * middle:
            return False
    return True


def _longest(calls: dict[Any, int]) -> int:
    """Return the steps of a request: the calls of all transformers under one branch."""
    by_transformer: dict[int, int] = {}
    for (index, _), count in calls.items():
        by_transformer[index] = max(by_transformer.get(index, 0), count)
    return sum(by_transformer.values())


def _calls(recorded: Any) -> int:
    return _longest({lane: len(calls) for lane, calls in recorded.calls.items()})
