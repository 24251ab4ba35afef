"""How long the warm-up of a short request should be: the trained model at 4, 8 and 12 steps.

python -m bench.warmup                             # the table of docs/options.md
python -m bench.warmup --digits 1 --batches 1      # a quick look

For settings that cache little, much, and every other step that may be: the steps cached, the CPU
time of the plain model over that with the cache, and how close the pictures are to the plain ones
of the same steps and seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bench.methods import Bench, Method

STEPS = (4, 8, 12)
RULES: dict[str, dict[str, Any]] = {
    "F8B0 R0.08": {"Fn_compute_blocks": 8, "residual_diff_threshold": 0.08},
    "F1B0 R0.3": {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.3},
    "F1B0 R1 MC1": {
        "Fn_compute_blocks": 1,
        "residual_diff_threshold": 1.0,
        "max_continuous_cached_steps": 1,
    },
}


def lengths(steps: int) -> list[int]:
    """Return the lengths that are tried: 1, quarters of the steps, and cache-dit's default."""
    return sorted({1, steps // 4, steps // 2, 3 * steps // 4, 8})


def measure(steps: int, per_digit: int, batches: int, device: str) -> list[dict[str, Any]]:
    """Return a record per rule and length of the warm-up."""
    bench = Bench(steps, per_digit, device)
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for seed in range(batches):
        for rule, options in RULES.items():
            for length in lengths(steps):
                full = bench.draw(seed)
                method = Method(rule, levels={"": {**options, "max_warmup_steps": length}})
                record = bench.measure(method, "", seed, full)
                cells.setdefault((rule, length), []).append(record)
    return [
        {"steps": steps, "rule": rule, "warmup": length, **_mean(records)}
        for (rule, length), records in cells.items()
    ]


def _mean(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    means = {
        name: statistics.mean(record[name] for record in records) for name in ("cached", "psnr")
    }
    ratios = [record["full_cpu_seconds"] / record["cpu_seconds"] for record in records]
    return {**means, "speedup": statistics.median(ratios)}


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """Return a table: a line per number of steps and length, three columns per rule."""
    rules = list(dict.fromkeys(row["rule"] for row in records))
    lines = [
        "| steps | warm-up |" + "".join(f" {rule} | CPU time | PSNR dB |" for rule in rules),
        "| --- | --- |" + " --- | --- | --- |" * len(rules),
    ]
    for steps, length in dict.fromkeys((row["steps"], row["warmup"]) for row in records):
        rows = [row for row in records if (row["steps"], row["warmup"]) == (steps, length)]
        cells = [f"{row['cached']:.3g} | {row['speedup']:.2f}x | {row['psnr']:.1f}" for row in rows]
        lines.append(f"| {steps} | {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.warmup", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[*STEPS])
    parser.add_argument("--digits", type=int, default=1, help="images per digit and batch")
    parser.add_argument("--batches", type=int, default=10, help="batches, of seeds 0, 1, ...")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    records = []
    for steps in args.steps:
        records += measure(steps, args.digits, args.batches, args.device)
        print(f"{steps} steps are done", flush=True)
    print(f"{10 * args.digits * args.batches} images each on {args.device}")
    print(markdown(records))


if __name__ == "__main__":
    main()
