"""Draw the same digits with several cache settings; compare time and pictures."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from tqdm import tqdm

import dbcache
from dbcache.config.cache import UNLIMITED, DBCacheConfig
from dbcache.config.predictors import CalibratorConfig, TaylorSeerCalibratorConfig
from dbcache.demo import digits
from dbcache.demo.picture import draw_grid
from dbcache.demo.quality import DigitClassifier, psnr, ssim
from dbcache.results.markup import columns

WARMUP_STEPS = 3


@dataclass
class Setting:
    """One row: how the cache is set, and what came of it."""

    name: str
    cache: DBCacheConfig | None = None
    calibrator: CalibratorConfig | None = None
    seconds: list[float] = field(default_factory=list)
    images: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    cached: int = 0


def settings() -> list[Setting]:
    """Return the demo's rows, from no cache to an aggressive one."""
    taylor = TaylorSeerCalibratorConfig(taylorseer_order=1)
    return [
        Setting("uncached"),
        Setting("default: F8B0 W8 R0.08", DBCacheConfig()),
        Setting("F1B0 W4 R0.12", _one_block(0.12)),
        Setting("F1B0 W4 MC4 R0.30 + TaylorSeer", _one_block(0.3, 4), taylor),
        Setting("F1B0 W4 MC6 R0.50 + TaylorSeer", _one_block(0.5, 6), taylor),
    ]


def _one_block(threshold: float, in_a_row: int = UNLIMITED) -> DBCacheConfig:
    """Return settings with one probe block and a short warm-up."""
    return DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=4,
        max_continuous_cached_steps=in_a_row,
        residual_diff_threshold=threshold,
    )


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
        self.always_run = {
            blocks: pipe_of_ends(pipe, *blocks) for blocks in {self._blocks(r) for r in rows[1:]}
        }
        self.ends_seconds: dict[tuple[int, int], list[float]] = {b: [] for b in self.always_run}

    @staticmethod
    def _blocks(row: Setting) -> tuple[int, int]:
        assert row.cache is not None
        return row.cache.Fn_compute_blocks, row.cache.Bn_compute_blocks

    def draw(self, pipe: FluxPipeline, steps: int) -> tuple[torch.Tensor, float]:
        """Return the images and the seconds that one call of the pipeline took."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        arguments = digits.prompt(self.prompts)
        synchronize(pipe)
        start = time.perf_counter()
        tokens = pipe(**arguments, num_inference_steps=steps, generator=generator).images
        synchronize(pipe)
        return digits.decode(tokens), time.perf_counter() - start

    def run(self, repeats: int) -> None:
        """Time every setting `repeats` times, one after the other in each round."""
        progress = tqdm(total=(repeats + 1) * (len(self.rows) + len(self.always_run)))
        turns = [(row.name, lambda steps, row=row: self.time_row(row, steps)) for row in self.rows]
        seconds = {row.name: row.seconds for row in self.rows}
        for blocks, pipe in self.always_run.items():
            name = f"cost of a cached step, F{blocks[0]}B{blocks[1]}"
            turns.append((name, lambda steps, pipe=pipe: self.draw(pipe, steps)[1]))
            seconds[name] = self.ends_seconds[blocks]
        for round_number in range(repeats + 1):
            is_timed = round_number > 0  # the first, short round warms up
            first = round_number % len(turns)  # so that no one always runs after the same other
            for name, turn in turns[first:] + turns[:first]:
                progress.set_description(name)
                with warnings.catch_warnings():
                    if not is_timed:  # too few steps to cache any, which the cache says
                        warnings.simplefilter("ignore", UserWarning)
                    elapsed = turn(self.steps if is_timed else WARMUP_STEPS)
                seconds[name] += [elapsed] * is_timed
                progress.update()
        progress.close()

    def time_row(self, row: Setting, steps: int) -> float:
        """Draw under one setting; keep the images and the steps cached, return the seconds."""
        if row.cache is not None:
            dbcache.enable(self.pipe, row.cache, row.calibrator)
        row.images, elapsed = self.draw(self.pipe, steps)
        if row.cache is not None:
            lanes = dbcache.summary(self.pipe, logging=False).lanes
            row.cached = len(lanes[0].cached_steps) if lanes else 0
            dbcache.disable(self.pipe)
        return elapsed

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
            seconds = statistics.median(row.seconds)
            fraction, cost = row.cached / self.steps, 1.0
            if row.cache is not None:
                cost = statistics.median(self.ends_seconds[self._blocks(row)]) / full
            records.append(
                {
                    "setting": row.name,
                    "cached": f"{row.cached}/{self.steps}",
                    "seconds": seconds,
                    "speedup": full / seconds,
                    "bound": 1 / (1 - fraction + fraction * cost),
                    "psnr": psnr(row.images, reference),
                    "ssim": ssim(row.images, reference),
                    "accuracy": classifier and classifier.accuracy(row.images, labels),
                }
            )
        return records


def pipe_of_ends(pipe: FluxPipeline, fn: int, bn: int) -> FluxPipeline:
    """Return the pipeline with only the blocks that a cached step runs."""
    whole = pipe.transformer
    blocks = [*whole.transformer_blocks, *whole.single_transformer_blocks]
    kept = set(range(fn)) | set(range(len(blocks) - bn, len(blocks)))
    double = [b for i, b in enumerate(blocks) if i in kept and i < len(whole.transformer_blocks)]
    single = [b for i, b in enumerate(blocks) if i in kept and i >= len(whole.transformer_blocks)]
    config = {**whole.config, "num_layers": 0, "num_single_layers": 0}
    ends = FluxTransformer2DModel.from_config(config)
    ends.load_state_dict(whole.state_dict(), strict=False)
    ends.to(whole.device).eval()
    ends.transformer_blocks.extend(double)
    ends.single_transformer_blocks.extend(single)
    short = FluxPipeline(**{**pipe.components, "transformer": ends})
    short.set_progress_bar_config(disable=True)
    return short


def synchronize(pipe: FluxPipeline) -> None:
    """Wait for the device, so that a clock reading means something."""
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)


def format_table(records: list[dict[str, Any]]) -> str:
    """Return the records as an aligned text table."""
    forms = {
        "setting": "{}",
        "cached": "{}",
        "seconds": "{:.2f}",
        "speedup": "{:.2f}x",
        "bound": "{:.2f}x",
        "psnr": "{:.1f}",
        "ssim": "{:.4f}",
        "accuracy": "{:.1%}",
    }
    heads = {"psnr": "PSNR dB", "ssim": "SSIM", "speedup": "speed-up"}
    rows = [[heads.get(name, name) for name in forms]]
    rows += [
        ["-" if r[name] is None else form.format(r[name]) for name, form in forms.items()]
        for r in records
    ]
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
