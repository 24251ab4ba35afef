"""Draw the same digits with several cache settings; compare time and pictures."""

from __future__ import annotations

import copy
import json
import statistics
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from tqdm import tqdm

import dbcache
from dbcache.config.cache import DBCacheConfig
from dbcache.config.predictors import CalibratorConfig, TaylorSeerCalibratorConfig
from dbcache.demo import digits
from dbcache.demo.picture import draw_grid
from dbcache.demo.quality import DigitClassifier, psnr, ssim
from dbcache.results.markup import columns
from dbcache.results.page import bound
from dbcache.tuning.progress import quietly
from dbcache.tuning.rows import timed

WARMUP_STEPS = 3


@dataclass
class Setting:
    """One row: how the cache is set, and what came of it; by default on the demo's pipeline."""

    name: str
    cache: DBCacheConfig | None = None
    calibrator: CalibratorConfig | None = None
    pipe: FluxPipeline | None = None
    seconds: list[float] = field(default_factory=list)
    images: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    cached: int = 0


def settings() -> list[Setting]:
    """Return the demo's rows, from no cache to an aggressive one."""
    taylor = TaylorSeerCalibratorConfig(taylorseer_order=1)
    one = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.12)
    four = one.changed(max_continuous_cached_steps=4, residual_diff_threshold=0.3)
    six = one.changed(max_continuous_cached_steps=6, residual_diff_threshold=0.5)
    return [
        Setting("uncached"),
        Setting("default: F8B0 W8 R0.08", DBCacheConfig()),
        Setting("F1B0 W4 R0.12", one),
        Setting("F1B0 W4 MC4 R0.30 + TaylorSeer", four, taylor),
        Setting("F1B0 W4 MC6 R0.50 + TaylorSeer", six, taylor),
    ]


class Demo:
    """Runs the pipeline under each setting, interleaved, and tables the results."""

    def __init__(
        self, pipe: FluxPipeline, rows: list[Setting], *, steps: int, per_digit: int, seed: int
    ) -> None:
        self.pipe = pipe
        self.rows = rows
        self.steps = steps
        self.seed = seed
        self.prompts = list(range(digits.NUM_CLASSES)) * per_digit
        probes = {row.cache.Fn_compute_blocks for row in rows if row.cache is not None}
        self.costs = {blocks: only_first(pipe, blocks) for blocks in probes}

    def run(self, repeats: int) -> None:
        """Time every setting `repeats` times, one after the other in each round."""
        turns = [*self.rows, *self.costs.values()]
        with quietly():  # too few steps to cache any
            for row in turns:
                self.draw(row, WARMUP_STEPS)
        # so that no one always runs after the same other
        rounds = [turns[i % len(turns) :] + turns[: i % len(turns)] for i in range(repeats)]
        progress = tqdm([row for turns in rounds for row in turns])
        for row in progress:
            progress.set_description(row.name)
            row.seconds.append(self.draw(row, self.steps))

    def draw(self, row: Setting, steps: int) -> float:
        """Draw under one setting; keep the images and the steps cached, return the seconds."""
        pipe = row.pipe or self.pipe
        generator = torch.Generator("cpu").manual_seed(self.seed)
        call = {"num_inference_steps": steps, "generator": generator, **digits.prompt(self.prompts)}
        if row.cache is not None:
            dbcache.enable(pipe, row.cache, row.calibrator)
        output, seconds = timed(lambda pipe: pipe(**call), pipe)
        row.images = digits.decode(output.images)
        if row.cache is not None:
            lanes = dbcache.summary(pipe, logging=False).lanes
            row.cached = len(lanes[0].cached_steps) if lanes else 0
            dbcache.disable(pipe)
        return seconds

    def table(self) -> list[dict[str, Any]]:
        """Return one record per setting; PSNR, SSIM and speed-up are against the first.

        The accuracy is None where scikit-learn, which has the real digits, is not installed.
        """
        classifier = DigitClassifier() if find_spec("sklearn") else None
        labels = torch.tensor(self.prompts)
        reference = self.rows[0].images
        full = statistics.median(self.rows[0].seconds)
        records = []
        for row in self.rows:
            seconds, cost = statistics.median(row.seconds), 1.0
            if row.cache is not None:
                cached = self.costs[row.cache.Fn_compute_blocks]
                cost = statistics.median(cached.seconds) / full
            records.append(
                {
                    "setting": row.name,
                    "cached": f"{row.cached}/{self.steps}",
                    "seconds": seconds,
                    "speedup": full / seconds,
                    "bound": bound(row.cached / self.steps, cost),
                    "psnr": psnr(row.images, reference),
                    "ssim": ssim(row.images, reference),
                    "accuracy": classifier and classifier.accuracy(row.images, labels),
                }
            )
        return records


def only_first(pipe: FluxPipeline, blocks: int) -> Setting:
    """Return a row that draws with only the blocks that a cached step runs, the first ones."""
    whole, short = pipe.transformer, copy.copy(pipe.transformer)
    double = len(whole.transformer_blocks)
    short._modules = whole._modules.copy()
    short.transformer_blocks = whole.transformer_blocks[:blocks]
    short.single_transformer_blocks = whole.single_transformer_blocks[: max(0, blocks - double)]
    cheap = FluxPipeline(**{**pipe.components, "transformer": short})
    cheap.set_progress_bar_config(disable=True)
    return Setting(f"cost of a cached step, F{blocks}B0", pipe=cheap)


def format_table(records: list[dict[str, Any]]) -> str:
    """Return the records as an aligned text table."""
    forms = {
        "setting": ("setting", "{}"),
        "cached": ("cached", "{}"),
        "seconds": ("seconds", "{:.2f}"),
        "speedup": ("speed-up", "{:.2f}x"),
        "bound": ("bound", "{:.2f}x"),
        "psnr": ("PSNR dB", "{:.1f}"),
        "ssim": ("SSIM", "{:.4f}"),
        "accuracy": ("accuracy", "{:.1%}"),
    }
    rows = [[head for head, _ in forms.values()]]
    for record in records:
        cells = [(record[name], form) for name, (_, form) in forms.items()]
        rows.append(["-" if value is None else form.format(value) for value, form in cells])
    return columns(rows)


def run(
    out: Path, *, steps: int, per_digit: int, repeats: int, seed: int, device: str | None
) -> list[dict[str, Any]]:
    """Run the demo, write ``digits.png`` and ``digits.json`` into `out`, print the table."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = digits.load_pipeline(device=device)
    pipe.set_progress_bar_config(disable=True)
    demo = Demo(pipe, settings(), steps=steps, per_digit=per_digit, seed=seed)
    demo.run(repeats)
    records = demo.table()
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "digits.png"
    draw_grid(picture, [(row.name, row.images) for row in demo.rows], digits.NUM_CLASSES)
    (out / "digits.json").write_text(json.dumps(records, indent=2) + "\n")
    accuracy = "a classifier of\nreal digits"
    if records[0]["accuracy"] is None:
        accuracy = "needs scikit-learn:\npip install 'dbcache-dit[bench]'"
    print(format_table(records))
    print(
        f"{len(demo.prompts)} images of 16x16, {steps} steps, median of {repeats} interleaved runs "
        f"on {device}.\nspeed-up: wall time of the whole pipeline call. bound: 1/((1-f) + f*c), f "
        f"the fraction of\ncached steps, c the measured cost of a call with only the blocks that "
        f"a cached step runs.\nPSNR and SSIM: against the uncached pictures of the same seeds. "
        f"accuracy: {accuracy}.\nPicture: {picture}"
    )
    return records
