"""A schedule of a trained model, and how it compares with the methods of `bench.methods`.

python -m bench.run schedules               # tune, 9 minutes at most; then 2 batches of all rows
python -m bench.run schedules --minutes 0   # compare only; bench/calibrations/digits_schedule.json
python -m bench.run schedules --model moving_digits

Calibrated on seeds from 100 on, checked on seeds from 200 on; what is compared are seeds 0, 1, ...
The records go to bench/results/front_MODEL.json; table and picture into docs/methods.md.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

import dbcache
from bench import methods
from bench.fronts import draw_fronts
from bench.subjects import DIGITS, SUBJECTS, Subject

CALIBRATED, VALIDATED = 100, 200
TUNED = "tuned schedule"


def tune(subject: Subject, minutes: float, pictures: int) -> None:
    """Write the schedule."""
    dbcache.tune(
        subject.bench(subject.steps, 1, "cpu").pipe,
        [subject.drawing(CALIBRATED + i, subject.steps) for i in range(pictures)],
        validation=[subject.drawing(VALIDATED + i, subject.steps) for i in range(2)],
        full_steps=list(subject.full.values()),
        per_branch=subject.per_branch,
        budget_minutes=minutes,
        path=subject.path,
    )


def compare(subject: Subject, batches: int, levels: list[str]) -> dict[str, Any]:
    """Return the records and rows of the schedule and the closest methods, all of this run."""
    rows = (subject.tuned, *subject.beside)
    result: dict[str, Any] = {
        "steps": subject.steps, "images_per_batch": 10, "what": subject.what,
        "about": methods.facts("cpu"), "records": [],
    }  # fmt: skip
    bench = subject.bench(subject.steps, 1, "cpu")
    methods.measure_all(bench, rows, levels, result, batches, lambda: None)
    result["rows"] = methods.table(rows, result["records"])
    return result


def publish(subject: Subject, result: dict[str, Any], out: Path) -> None:
    """Write the records, and with them table and picture of the page, if they are its own."""
    out.write_text(methods.as_json(result), encoding="utf-8")
    if out == subject.results:
        methods.write_docs(methods.DOCS, text_of(result), f"front of {subject.name}", "schedules")
        draw_fronts(result["rows"], result["what"], subject.picture)


def text_of(result: dict[str, Any]) -> str:
    """Return what a page shows of the rows: a short table per level, and the schedule's leads."""
    ahead = "\n".join(f"- {line}" for line in leads(result["rows"]).splitlines())
    return f"{methods.best_rows(result, 'cpu_speedup')}\n\n{ahead}"


def leads(rows: list[dict[str, Any]]) -> str:
    """Return how far the schedule is ahead of the best other method at its cached steps.

    A method is interpolated linearly between its rows. Where all of them cache more, the one with
    the fewest cached steps stands for it.
    """
    others: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["method"] != TUNED:
            name = f"{row['method']} ({row['engine']})"
            others.setdefault(name, []).append((row["cached"], row["psnr"]))
    lines = []
    for own in (row for row in rows if row["method"] == TUNED):
        known = {name: interpolated(points, own["cached"]) for name, points in others.items()}
        values = {name: value for name, value in known.items() if value is not None}
        if not values:
            continue
        best = max(values, key=lambda name: values[name])
        lines.append(
            f"{own['level']}: {own['psnr']:.1f} dB at {own['cached']:.4g} cached, "
            f"{own['psnr'] - values[best]:+.1f} dB to {best}, {values[best]:.1f} dB there"
        )
    return "\n".join(lines)


def interpolated(points: list[tuple[float, float]], at: float) -> float | None:
    """Return the value at `at` between points, None beyond the last."""
    points = sorted(points)
    if at < points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / max(x1 - x0, 1e-9)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.schedules", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, default=DIGITS.name)
    parser.add_argument("--minutes", type=float, default=9.0, help="to tune; 0: not at all")
    parser.add_argument("--pictures", type=int, default=6, help="to calibrate on, of 5 digits each")
    parser.add_argument("--batches", type=int, default=2, help="of 10 digits; 0: do not compare")
    parser.add_argument("--levels", nargs="+", help="those of the schedule; all, if left out")
    parser.add_argument("--out", type=Path, help="JSON file for the records")
    args = parser.parse_args()
    subject = SUBJECTS[args.model]
    unknown = set(args.levels or ()) - subject.full.keys()
    if unknown:
        parser.error(f"--levels must be of {', '.join(subject.full)}, got {', '.join(unknown)}")
    if args.minutes:
        tune(subject, args.minutes, args.pictures)
    if args.batches:
        result = compare(subject, args.batches, args.levels or [*subject.full])
        print(f"{methods.markdown(result)}\n\n{leads(result['rows'])}")
        publish(subject, result, args.out or subject.results)


if __name__ == "__main__":
    with torch.no_grad():
        main()
