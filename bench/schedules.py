"""A schedule of the trained model, and how it compares with the methods of `bench.methods`.

python -m bench.run schedules               # tune, 9 minutes at most; then 2 batches of all rows
python -m bench.run schedules --minutes 0   # compare only; bench/calibrations/digits_schedule.json

Calibrated on seeds from 100 on, checked on seeds from 200 on; what is compared are seeds 0, 1, ...
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

import dbcache
from bench import methods
from dbcache.cli.drawn import digits_drawing
from dbcache.demo import digits

STEPS = 50
FULL_STEPS = {"1.5x": 33, "2x": 25, "3x": 16, "4x": 12}
"""By level of `bench.methods`."""

CALIBRATED, VALIDATED = 100, 200
PATH = methods.CALIBRATIONS / "digits_schedule.json"

TUNED = methods.Method(
    "tuned schedule",
    cache={"schedule": str(PATH)},
    levels={level: {"target": f"{full} full"} for level, full in FULL_STEPS.items()},
    alone=True,
)
BESIDE = (
    "EasyCache, FoCa", "TeaCache, FoCa", "MagCache, FoCa", "FoCa, by threshold", "FoCa",
    "TaylorSeer 2",
)  # fmt: skip
"""The closest rows of `bench.methods` at each level."""


def tune(minutes: float, pictures: int) -> None:
    """Write the schedule."""
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    dbcache.tune(
        pipe,
        [digits_drawing(CALIBRATED + i, STEPS) for i in range(pictures)],
        validation=[digits_drawing(VALIDATED + i, STEPS) for i in range(2)],
        full_steps=list(FULL_STEPS.values()),
        budget_minutes=minutes,
        path=PATH,
    )


def compare(batches: int, levels: list[str]) -> str:
    """Return a table of the schedule and the closest methods, all measured in this run."""
    rows = (TUNED, *(m for m in methods.METHODS if m.name in BESIDE))
    result: dict[str, Any] = {
        "steps": STEPS, "images_per_batch": 10, "about": methods.facts("cpu"), "records": [],
    }  # fmt: skip
    bench = methods.Bench(STEPS, 1, "cpu")
    methods.measure_all(bench, rows, levels, result, batches, lambda: None)
    result["rows"] = methods.table(rows, result["records"])
    return f"{methods.markdown(result)}\n\n{leads(result['rows'])}"


def leads(rows: list[dict[str, Any]]) -> str:
    """Return how far the schedule is ahead of the best other method at its cached steps.

    A method is interpolated linearly between its rows. Where all of them cache more, the one with
    the fewest cached steps stands for it.
    """
    others: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["method"] != TUNED.name:
            name = f"{row['method']} ({row['engine']})"
            others.setdefault(name, []).append((row["cached"], row["psnr"]))
    lines = []
    for own in (row for row in rows if row["method"] == TUNED.name):
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
    parser.add_argument("--minutes", type=float, default=9.0, help="to tune; 0: not at all")
    parser.add_argument("--pictures", type=int, default=6, help="to calibrate on, of 5 digits each")
    parser.add_argument("--batches", type=int, default=2, help="of 10 digits; 0: do not compare")
    parser.add_argument("--levels", nargs="+", choices=FULL_STEPS, default=["2x", "3x", "4x"])
    parser.add_argument("--out", type=Path, help="Markdown file for the table, too")
    args = parser.parse_args()
    if args.minutes:
        tune(args.minutes, args.pictures)
    if args.batches:
        text = compare(args.batches, args.levels)
        print(text)
        if args.out is not None:
            args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main()
