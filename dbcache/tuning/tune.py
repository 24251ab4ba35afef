"""`tune`: a budget in, a schedule out."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbcache.adapters.models.lookup import find_specs
from dbcache.adapters.requests.cached_transformer import handle_of
from dbcache.config.options import check_choice, check_int, check_number
from dbcache.config.schedule import described, to_text
from dbcache.kernels.common.lane_state import MAX_SLOTS
from dbcache.targets import parts as parts_of
from dbcache.targets import resolve
from dbcache.tuning.pictures import draws_of
from dbcache.tuning.problem import Fit
from dbcache.tuning.progress import Progress
from dbcache.tuning.rows import Row
from dbcache.tuning.tuner import CHOOSE, MOST_SECONDS, SEARCH, Tuner, Wanted

FRONT = (1.5, 2.0, 3.0, 4.0)
"""Speeds of the rows where nothing was asked for."""

AIM = 0.985
"""Of the wanted speed that times of the ends must promise."""

SLOWER, FASTER = 0.975, 1.05
"""Measured over wanted speed between which a row is taken: 1.95x to 2.1x for 2x."""

MOST_TRIES = 3


def tune(
    target: Any,
    prompts: Any,
    *,
    target_speedup: float | Sequence[float] | None = None,
    target_psnr: float | Sequence[float] | None = None,
    full_steps: int | Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    validation: Any = None,
    predictors: str = "auto",
    snapshots: int = 4,
    per_branch: bool = False,
    guard: bool = False,
    path: str | os.PathLike[str] | None = None,
    budget_minutes: float = 30.0,
    store: str = "auto",
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Find a schedule: which steps to run in full, and the weights that predict the others.

    Pictures are drawn with all steps in full, and the error of every later call with the residual
    of every earlier one is measured; masks are searched, each with the weights that leave the
    smallest final error, tried in closed loop, and measured on pictures held out. docs/tuning.md.

    Args:
        target: a pipeline, or a `BlockAdapter` with one; the cache is off before and after.
        prompts: prompts, mappings of arguments, or functions of `target` that return pictures, the
            same ones each time; or one of these. A third is held out if `validation` is None.
        target_speedup: wall time of a plain call over that of a cached one; one or several.
        target_psnr, full_steps: likewise, in dB on pictures held out, and steps that run in full.
            None of the three: rows for 1.5x, 2x, 3x and 4x.
        num_inference_steps: of the calls, where prompts are given; `options`: what else they take.
        predictors: "weights" fitted to the model, "foca" without, or "auto": what is closest.
        snapshots: residuals that the weights add up, 3 to 8.
        per_branch: guidance branches may have masks of their own.
        guard: keep how much the steps move, for ``enable(..., guard=1.5)``.
        path: the file to write.
        budget_minutes: time at most; a few draws at least.
        store: where residuals go: "device", "cpu", "fp8" (on the CPU) or "auto".
        progress: print what is done, to stderr.

    Returns:
        The content of the file, which `enable` takes, too.

    Raises:
        RuntimeError, TypeError, ValueError, FileNotFoundError: the cache is on, a draw is not the
            same twice, or arguments that are not allowed. Nothing is written then.
    """
    wanted = _wanted(target_speedup, target_psnr, full_steps)
    how = {"predictors": predictors, "per_branch": per_branch, "guard": guard, "store": store}
    shown = Progress(budget_minutes, shows=progress)
    drawn = (prompts, validation, num_inference_steps, options)
    tuner = _tuner(target, drawn, how, snapshots, shown)
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"tune: the folder of path must exist, got {path}; make it")
    return _run(tuner, wanted, path)


def _tuner(
    target: Any,
    drawn: tuple[Any, Any, int | None, dict[str, Any]],
    how: dict[str, Any],
    snapshots: int,
    shown: Progress,
) -> Tuner:
    """Return what tunes, after a look at all arguments."""
    check_choice("tune: predictors", how["predictors"], ("auto", "weights", "foca"))
    check_choice("tune: store", how["store"], ("auto", "device", "cpu", "fp8"))
    check_int("tune: snapshots", snapshots, 3, MAX_SLOTS)
    if any(handle_of(part) is not None for part in parts_of(target)):
        raise RuntimeError("tune: the cache must be off, got an enabled one; disable it first")
    prompts, validation, steps, options = drawn
    calibration = draws_of("tune", prompts, steps, options)
    if validation is None:
        calibration, held = _split(calibration)
    else:
        held = draws_of("tune: validation", validation, steps, options)
    fit = Fit(snapshots=snapshots)
    return Tuner(target, calibration, held, steps=steps, fit=fit, progress=shown, **how)


def _run(tuner: Tuner, wanted: Wanted, path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Tune, tell what was found, and write it."""
    _, adapter = resolve(tuner.target)
    specs = adapter.specs() if adapter is not None else find_specs(tuner.target)
    tuner.calibrate([type(spec.transformer).__name__ for spec in specs])
    content = tuner.finish(_rows(tuner, wanted, tuner.progress))
    for row in content["rows"]:
        tuner.progress.say(described(row))
    if path is not None:
        Path(path).write_text(to_text(content), encoding="utf-8")
        tuner.progress.say(f"wrote {path} after {tuner.progress.spent:.0f} s")
    return content


def _wanted(speedup: Any, psnr: Any, full: Any) -> Wanted:
    """Return what was asked for, checked."""
    given = [x for x in (speedup, psnr, full) if x is not None]
    if len(given) > 1:
        raise ValueError(
            "tune: one of target_speedup, target_psnr and full_steps must be given, got several; "
            "give several values of one, or tune twice"
        )

    def each(value: Any) -> list[Any]:
        if value is None:
            return []
        return list(value) if isinstance(value, list | tuple) else [value]

    speedups = [float(check_number("tune: target_speedup", x, low=1.0)) for x in each(speedup)]
    psnrs = [float(check_number("tune: target_psnr", x, positive=True)) for x in each(psnr)]
    counts = [check_int("tune: full_steps", x, 1) for x in each(full)]
    return Wanted(tuple(speedups), tuple(psnrs), tuple(counts))


def _split(draws: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return draws to calibrate on and draws held out."""
    held = len(draws) // 3
    if held == 0:
        warnings.warn(
            f"tune: {len(draws)} prompts are too few to hold one out; quality is measured on "
            f"pictures that were calibrated on. Give three or more, or validation=",
            stacklevel=3,
        )
        return draws, draws
    return draws[:-held], draws[-held:]


def _rows(tuner: Tuner, wanted: Wanted, shown: Progress) -> list[Row]:
    """Search, choose and measure the rows that were asked for."""
    if wanted.psnrs:
        return [_of_quality(tuner, psnr, shown) for psnr in wanted.psnrs]
    if wanted.full:
        too_many = [x for x in wanted.full if x > tuner.total]
        if too_many:
            raise ValueError(
                f"tune: full_steps must be at most the {tuner.total} steps of a request, got "
                f"{too_many[0]}"
            )
        counts = list(wanted.full)
    else:
        counts = [tuner.full_for(AIM * speed) for speed in wanted.speedups or FRONT]
    rows = _measured(tuner, sorted(set(counts), reverse=True), shown)
    if not wanted.speedups:
        return rows
    return [_of_speed(tuner, speed, rows, shown) for speed in wanted.speedups]


def _measured(tuner: Tuner, counts: Sequence[int], shown: Progress) -> list[Row]:
    """Return the rows of some numbers of full steps, validated."""
    seconds = max(0.5, min(MOST_SECONDS, shown.left(SEARCH) / max(1, len(counts))))
    rows = [tuner.row_of(count, seconds) for count in counts]
    chosen = []
    for row in rows:
        is_time = shown.allows(2 * tuner.seconds_of(row.full), CHOOSE)
        chosen.append(tuner.choose(row) if is_time or tuner.predictors == "foca" else row)
    tuner.validate(chosen)
    return chosen


def _of_speed(tuner: Tuner, speed: float, rows: list[Row], shown: Progress) -> Row:
    """Return a row of that speed, measured: other numbers of full steps are tried where it is not.

    The row with the most full steps that is as fast is best, as long as the times agree.
    """
    count = tuner.full_for(AIM * speed)
    known = {round(row.full): row for row in rows}
    for _ in range(MOST_TRIES):
        row = known[count]
        share = row.speedup / speed
        if SLOWER <= share <= FASTER:
            break
        other = max(1, min(tuner.total, count + (1 if share > FASTER else -1)))
        cost = 2 * (tuner.draw_seconds + tuner.seconds_of(other))
        if other in known or not shown.allows(cost):
            break
        known[other] = _measured(tuner, [other], shown)[0]
        count = other
    fitting = [row for row in known.values() if SLOWER * speed <= row.speedup]
    if not fitting:
        shown.say(f"{speed:g}x was not reached; the fastest row is taken")
        return max(known.values(), key=lambda row: row.speedup)
    return max(fitting, key=lambda row: row.full)


def _of_quality(tuner: Tuner, psnr: float, shown: Progress) -> Row:
    """Return the row with the fewest full steps that has this quality on pictures held out."""
    low, high = 1, tuner.total
    known: dict[int, Row] = {}
    count = max(2, tuner.total // 3)
    while low < high:
        seconds = max(0.5, min(MOST_SECONDS, 0.1 * shown.left(SEARCH)))
        row = tuner.choose(tuner.row_of(count, seconds))
        known[count] = row
        if row.chosen >= psnr:
            high = count
        else:
            low = count + 1
        if not shown.allows(3 * tuner.seconds_of(count), CHOOSE):
            break
        count = (low + high) // 2
    count = high
    for _ in range(MOST_TRIES):
        row = known.get(count) or tuner.row_of(count, 1.0)
        if not row.psnr:
            tuner.validate([row])
        if statistics.mean(row.psnr) >= psnr or count >= tuner.total - 1:
            return row
        count += 1
        if not shown.allows(2 * tuner.draw_seconds):
            break
    shown.say(f"{psnr:g} dB was not reached on pictures held out; {described(row.entry())}")
    return row
