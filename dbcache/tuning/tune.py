"""`tune`: a budget in, a schedule out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbcache.adapters.models.lookup import find_specs
from dbcache.adapters.requests.cached_transformer import handle_of
from dbcache.config.options import check_choice, check_int, check_number
from dbcache.config.schedule import described, to_text
from dbcache.kernels.common.lane_state import MAX_SLOTS
from dbcache.notices import say
from dbcache.targets import parts as parts_of
from dbcache.targets import resolve
from dbcache.tuning.pictures import draws_of
from dbcache.tuning.problem import Fit
from dbcache.tuning.progress import Progress
from dbcache.tuning.rows import Row
from dbcache.tuning.tuner import Tuner, Wanted

FRONT = (1.5, 2.0, 3.0, 4.0)
"""Speeds of the rows where nothing was asked for."""

AIM = 0.985
"""Of the wanted speed that times of the ends must promise."""

SLOWER, FASTER = 0.975, 1.05
"""Measured over wanted speed between which a row is taken: 1.95x to 2.1x for 2x."""

CLOSE = 2.0
"""Decibels above the wanted quality at which fewer full steps are tried."""

MOST_TRIES = 6


def tune(
    target: Any,
    prompts: Any,
    *,
    target_speedup: float | Sequence[float] | None = None,
    target_psnr: float | Sequence[float] | None = None,
    full_steps: int | Sequence[int] | None = None,
    num_inference_steps: int | Sequence[int] | None = None,
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

    Masks and weights are searched by the errors of reused residuals in pictures with all steps in
    full, tried in closed loop, and measured on pictures held out. docs/tuning.md.

    Args:
        target: a pipeline, or a `BlockAdapter` with one; the cache is off before and after.
        prompts: prompts, mappings of arguments, or functions of `target` that return pictures, the
            same ones each time; or one of these. A third is held out if `validation` is None.
        target_speedup: wall time of a plain call over that of a cached one; one or several.
        target_psnr, full_steps: likewise, in dB on pictures held out, and steps that run in full.
            Rows for all that is given; for nothing: 1.5x, 2x, 3x and 4x.
        num_inference_steps: of the calls, where prompts are given; `options`: what else they take.
            Several: one file for all, and functions are called with the number as well.
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
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"tune: the folder of path must exist, got {path}; make it")
    given = prompts, validation, num_inference_steps, options
    content = _found(target, given, how, snapshots, shown, wanted)
    if path is not None:
        Path(path).write_text(to_text(content), encoding="utf-8")
        shown.say(f"wrote {path} after {shown.spent:.0f} s")
    return content


def _found(
    target: Any,
    given: tuple[Any, Any, Any, dict[str, Any]],
    how: dict[str, Any],
    snapshots: int,
    shown: Progress,
    wanted: Wanted,
) -> dict[str, Any]:
    """Tune; several numbers of steps have a share of the time each, and the fewest come first."""
    prompts, validation, counts, options = given
    counts = [check_int("tune: num_inference_steps", x, 1) for x in _each(counts)]
    several = len(counts) > 1
    if len(set(counts)) < len(counts):
        raise ValueError(f"tune: num_inference_steps must be different numbers, got {counts}")
    contents: list[dict[str, Any]] = []
    for number, steps in enumerate(sorted(counts) or [None]):
        part = shown.part(len(counts) - number) if several else shown
        drawn = (prompts, validation, steps, options)
        content = _run(_tuner(target, drawn, how, snapshots, part, is_told=several), wanted)
        if content["scheduler_steps"] in [each["scheduler_steps"] for each in contents]:
            raise ValueError(
                f"tune: functions must draw in as many steps as their second argument says, got "
                f"{content['scheduler_steps']} steps for each of {sorted(counts)}"
            )
        contents.append(content)
    return {**contents[0], "others": contents[1:]} if several else contents[0]


def _tuner(
    target: Any,
    drawn: tuple[Any, Any, int | None, dict[str, Any]],
    how: dict[str, Any],
    snapshots: int,
    shown: Progress,
    *,
    is_told: bool = False,
) -> Tuner:
    """Return what tunes, after a look at all arguments."""
    check_choice("tune: predictors", how["predictors"], ("auto", "weights", "foca"))
    check_choice("tune: store", how["store"], ("auto", "device", "cpu", "fp8"))
    check_int("tune: snapshots", snapshots, 3, MAX_SLOTS)
    if any(handle_of(part) is not None for part in parts_of(target)):
        raise RuntimeError("tune: the cache must be off, got an enabled one; disable it first")
    prompts, validation, steps, options = drawn
    calibration = draws_of("tune", prompts, steps, options, is_told=is_told)
    if validation is None:
        calibration, held = _split(calibration)
    else:
        held = draws_of("tune: validation", validation, steps, options, is_told=is_told)
    fit = Fit(snapshots=snapshots)
    return Tuner(target, calibration, held, steps=steps, fit=fit, progress=shown, **how)


def _run(tuner: Tuner, wanted: Wanted) -> dict[str, Any]:
    """Tune, tell what was found, and return it."""
    _, adapter = resolve(tuner.target)
    specs = adapter.specs() if adapter is not None else find_specs(tuner.target)
    tuner.calibrate([type(spec.transformer).__name__ for spec in specs])
    content = tuner.finish(_rows(tuner, wanted, tuner.progress))
    for row in content["rows"]:
        tuner.progress.say(f"of {content['num_inference_steps']} steps: {described(row)}")
    return content


def _wanted(speedup: Any, psnr: Any, full: Any) -> Wanted:
    """Return what was asked for, checked."""
    speedups = [check_number("tune: target_speedup", x, low=1.0) for x in _each(speedup)]
    psnrs = [check_number("tune: target_psnr", x, positive=True) for x in _each(psnr)]
    counts = [check_int("tune: full_steps", x, 1) for x in _each(full)]
    return Wanted(tuple(map(float, speedups)), tuple(map(float, psnrs)), tuple(counts))


def _each(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


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
    too_many = [x for x in wanted.full if x > tuner.total]
    if too_many:
        raise ValueError(
            f"tune: full_steps must be at most the {tuner.total} steps of a request, got "
            f"{too_many[0]}"
        )
    is_front = not (wanted.speedups or wanted.psnrs or wanted.full)
    speeds = FRONT if is_front else wanted.speedups
    counts = [*wanted.full, *(tuner.full_for(AIM * speed) for speed in speeds)]
    guesses = {psnr: tuner.full_of_quality(psnr) for psnr in wanted.psnrs}
    known = _measured(tuner, [*counts, *guesses.values()], later=2 * len(guesses))
    rows = [known[count] for count in (counts if is_front else wanted.full)]
    rows += [_of_speed(tuner, speed, known, shown) for speed in wanted.speedups]
    return rows + [_of_quality(tuner, psnr, guesses[psnr], shown) for psnr in wanted.psnrs]


def _measured(tuner: Tuner, counts: Sequence[int], later: int = 0) -> dict[int, Row]:
    """Return the rows of some numbers of full steps, measured on what was held out."""
    counts = sorted(set(counts), reverse=True)
    rows = tuner.made(counts, later)
    tuner.validate([row for row in rows if not row.psnr])
    return dict(zip(counts, rows, strict=True))


def _of_speed(tuner: Tuner, speed: float, known: dict[int, Row], shown: Progress) -> Row:
    """Return a row of that speed, measured: other numbers of full steps are tried where it is not.

    The row with the most full steps that is as fast is best, as long as the times agree.
    """
    count = tuner.full_for(AIM * speed)
    for _ in range(MOST_TRIES):
        share = known[count].speedup / speed
        if SLOWER <= share <= FASTER:
            break
        other = max(1, min(tuner.total, count + (1 if share > FASTER else -1)))
        cost = 2 * (tuner.draw_seconds + tuner.seconds_of(other))
        if other in known or not shown.allows(cost):
            break
        known |= _measured(tuner, [other])
        count = other
    fitting = [row for row in known.values() if SLOWER * speed <= row.speedup]
    if not fitting:
        row = max(known.values(), key=lambda row: row.speedup)
        say(f"tune: {speed:g}x was not reached; the fastest row is taken: {described(row.entry())}")
        return row
    return max(fitting, key=lambda row: row.full)


def _of_quality(tuner: Tuner, psnr: float, count: int, shown: Progress) -> Row:
    """Return the row with the fewest full steps that has this quality on pictures held out.

    Their mean must be as high, less its standard error, so that others have it, too. `count` is
    the number of full steps to begin with.
    """
    best = None
    for _ in range(MOST_TRIES):
        row = _measured(tuner, [count], later=1)[count]
        if row.sure_quality >= psnr:
            best = row
            if row.sure_quality < psnr + CLOSE or count == 1:
                return row
        elif best is not None or count >= tuner.total - 1:
            break
        count += 1 if best is None else -1
        if not shown.allows(2 * tuner.draw_seconds):
            break
    if best is not None:
        return best
    say(
        f"tune: {psnr:g} dB was not reached on pictures held out; the best row is taken: "
        f"{described(row.entry())}"
    )
    return row
