"""One batch of easy and hard samples: who decides, the batch, its worst sample, or each sample?

    python -m bench.rows [--steps 50] [--threshold 0.1] [--order 0] [--rounds 3] [--json FILE]

The trained digits model, one batch of 4 easy and 4 hard samples: of 40 that are drawn alone, those
with the most and those with the fewest cached steps. Then the batch is drawn without the cache and
with each `batch_reduce`, in turn, and every sample alone. PSNR is against the same sample without
the cache; time is the thread's own on a CPU, as a share of that without the cache. With --launches
the launches and the host time of a step are counted instead (`bench/row_launches.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

import dbcache
from bench import row_launches
from dbcache.demo import digits, quality

RULES = ("mean", "max", "each")
Sample = tuple[int, int]
"""A digit and a seed."""


class Rows:
    """Draws batches of digits.

    Args:
        steps: of denoising.
        threshold: `residual_diff_threshold`.
        order: of TaylorSeer; 0 reuses the residual.
    """

    def __init__(self, steps: int, threshold: float, order: int) -> None:
        self.pipe = digits.load_pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self.steps = steps
        self.options: dict[str, Any] = {
            "Fn_compute_blocks": 1,
            "max_warmup_steps": 4,
            "residual_diff_threshold": threshold,
        }
        if order:
            self.options |= {"enable_taylorseer": True, "taylorseer_order": order}

    def draw(
        self, samples: list[Sample], rule: str | None
    ) -> tuple[torch.Tensor, float, list[int]]:
        """Return images (B, 16, 16), seconds of this thread, and cached steps by lane."""
        if rule is not None:
            dbcache.enable(self.pipe, batch_reduce=rule, **self.options)
        generators = [torch.Generator().manual_seed(seed) for _, seed in samples]
        start = time.thread_time()
        tokens = self.pipe(
            **digits.prompt([digit for digit, _ in samples]),
            num_inference_steps=self.steps,
            generator=generators,
        ).images
        seconds = time.thread_time() - start
        cached: list[int] = []
        if rule is not None:
            lanes = dbcache.summary(self.pipe, logging=False).lanes
            cached = [len(lane.cached_steps) for lane in lanes]
            dbcache.disable(self.pipe)
        return digits.decode(tokens), seconds, cached

    def choose(self, count: int) -> list[Sample]:
        """Return the `count` easiest and the `count` hardest of 40 samples."""
        samples = [(digit, seed) for digit in range(10) for seed in range(4)]
        cached = [self.draw([sample], "mean")[2][0] for sample in samples]
        order = sorted(range(len(samples)), key=lambda i: -cached[i])
        return [samples[i] for i in (*order[:count], *order[-count:])]


def measure(steps: int, threshold: float, order: int, rounds: int, count: int) -> dict[str, Any]:
    """Return what was measured, by rule; "alone" is each sample by itself."""
    torch.set_num_threads(1)
    rows = Rows(steps, threshold, order)
    samples = rows.choose(count)
    plain, _, _ = rows.draw(samples, None)
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *RULES)}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        seconds["plain"].append(rows.draw(samples, None)[1])
        for rule in RULES:
            images, spent, cached = rows.draw(samples, rule)
            seconds[rule].append(spent)
            cached = cached if rule == "each" else cached * len(samples)
            results[rule] = {"cached": cached, "psnr": _by_sample(images, plain)}
    alone = [rows.draw([sample], "mean") for sample in samples]
    results["alone"] = {
        "cached": [cached[0] for _, _, cached in alone],
        "psnr": _by_sample(torch.cat([images for images, _, _ in alone]), plain),
    }
    base = statistics.median(seconds["plain"])
    for rule in RULES:
        results[rule]["time"] = statistics.median(seconds[rule]) / base
    return {"samples": samples, "steps": steps, "threshold": threshold, "rules": results}


def _by_sample(images: torch.Tensor, plain: torch.Tensor) -> list[float]:
    pairs = zip(images, plain, strict=True)
    return [round(quality.psnr(x[None], y[None]), 1) for x, y in pairs]


def table(found: dict[str, Any]) -> str:
    """Return a line per rule: cached steps and PSNR of each sample, time."""
    lines = [f"| decides | cached steps of {found['steps']}, by sample | PSNR, dB | time |"]
    lines.append("| --- | --- | --- | --- |")
    for rule, row in found["rules"].items():
        spent = f"{row['time']:.2f}" if "time" in row else ""
        cached, psnr = ("  ".join(map(str, row[name])) for name in ("cached", "psnr"))
        lines.append(f"| {rule} | {cached} | {psnr} | {spent} |")
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--order", type=int, default=0, help="of TaylorSeer; 0: reuse")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=4, help="easy samples, and as many hard ones")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    parser.add_argument("--launches", action="store_true", help="launches per step, and no images")
    given = parser.parse_args()
    if given.launches:
        print(row_launches.table())
        return
    found = measure(given.steps, given.threshold, given.order, given.rounds, given.count)
    print(f"# dbcache {dbcache.__version__}, torch {torch.__version__}, CPU, one thread")
    print(table(found))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
