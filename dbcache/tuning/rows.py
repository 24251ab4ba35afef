"""Rows of a schedule file: made of masks and weights, run, measured, put in order."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import dbcache
from dbcache.config.calibration import versions
from dbcache.config.schedule import FORMAT
from dbcache.tuning.pictures import Draw, pictures_of, psnr
from dbcache.tuning.problem import Fit, Masks, Weights
from dbcache.tuning.progress import quietly

DIGITS = 6
"""Significant digits of a weight in a file."""


@dataclass
class Row:
    """One row while it is made.

    Attributes:
        masks, weights: by lane; without weights all cached calls are predicted by FoCa.
        psnr: of held-out pictures, one by one; `speedups` likewise.
        changes: largest change per lane and cached call, where a guard was asked for.
        chosen: PSNR on pictures of the calibration, by which it was chosen.
        fit: how its weights were fitted.
    """

    masks: Masks
    weights: Weights
    psnr: list[float] = field(default_factory=list)
    speedups: list[float] = field(default_factory=list)
    changes: dict[tuple[int, str | None], dict[int, float]] = field(default_factory=dict)
    chosen: float = -math.inf
    fit: Fit = field(default_factory=Fit)

    @property
    def full(self) -> float:
        """Full steps: full calls over the branches that each step has."""
        lanes = len(self.masks)
        first = {index for index, _ in self.masks}
        return sum(map(sum, self.masks.values())) * len(first) / lanes

    def entry(self) -> dict[str, Any]:
        """Return the row as the file has it."""
        transformers: dict[int, dict[str, Any]] = {}
        for (index, branch), mask in sorted(self.masks.items(), key=lambda x: (x[0][0], str(x[0]))):
            lane: dict[str, Any] = {"mask": "".join(map(str, mask))}
            weights = self.weights.get((index, branch), {})
            lane["weights"] = {
                str(call): [float(f"{w:.{DIGITS}g}") for w in values]
                for call, values in weights.items()
            }
            changes = self.changes.get((index, branch), {})
            if changes:
                lane["changes"] = {str(k): float(f"{v:.4g}") for k, v in changes.items()}
            transformers.setdefault(index, {})[branch or ""] = lane
        full = self.full
        row: dict[str, Any] = {"full": int(full) if full == int(full) else round(full, 1)}
        if self.speedups:
            row["speedup"] = _spread(self.speedups, statistics.median(self.speedups), "expected")
        if self.psnr:
            finite = [x for x in self.psnr if x != math.inf] or [200.0]
            row["psnr"] = _spread(finite, statistics.mean(finite), "mean")
            row["psnr"]["std"] = round(statistics.pstdev(finite), 2)
            row["psnr"]["pictures"] = len(self.psnr)
        row["transformers"] = [transformers[index] for index in sorted(transformers)]
        return row

    @property
    def quality(self) -> float:
        """Mean PSNR of the held-out pictures, of those of the calibration where there are none."""
        return statistics.mean(self.psnr) if self.psnr else self.chosen

    @property
    def sure_quality(self) -> float:
        """`quality` less the standard error of the mean."""
        if len(self.psnr) < 2:
            return self.quality
        finite = [min(x, 200.0) for x in self.psnr]
        return statistics.mean(finite) - statistics.stdev(finite) / math.sqrt(len(finite))

    @property
    def speedup(self) -> float:
        """Median speed-up; nan where it was not measured."""
        return statistics.median(self.speedups) if self.speedups else math.nan


def _spread(values: Sequence[float], middle: float, name: str) -> dict[str, float]:
    return {
        name: round(middle, 3),
        "low": round(min(values), 3),
        "high": round(max(values), 3),
    }


class Runner:
    """Draws under rows and without them; the cache is off in between.

    Args:
        target: a pipeline, or what the draws take.
        frame: what all rows have in common: the content of a file without rows.
    """

    def __init__(self, target: Any, frame: Mapping[str, Any]) -> None:
        self.target, self.frame = target, frame
        self._plain: dict[int, list[torch.Tensor]] = {}

    def content(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return a file of these rows."""
        return {**self.frame, "rows": [row.entry() for row in rows]}

    def remember(self, draw: Draw, output: Any) -> None:
        """Keep a plain picture that was drawn elsewhere."""
        self._plain[id(draw)] = pictures_of(output)

    def plain(self, draw: Draw) -> float:
        """Draw without the cache; return the seconds, and keep the pictures.

        Raises:
            RuntimeError: the draw gives another picture than before.
        """
        output, seconds = timed(draw, self.target)
        pictures, known = pictures_of(output), self._plain.get(id(draw))
        if known is not None and any(psnr(x, y) < 60 for x, y in zip(pictures, known, strict=True)):
            raise RuntimeError(
                "tune: a draw must give the same picture each time, got another one; seed its "
                "generator inside of the function"
            )
        self._plain.setdefault(id(draw), pictures)
        return seconds

    @quietly()
    def run(self, row: Row, draw: Draw) -> tuple[list[float], float]:
        """Draw under a row; return the PSNR of each picture, and the seconds."""
        dbcache.enable(self.target, schedule=self.content([row]))
        try:
            output, seconds = timed(draw, self.target)
        finally:
            dbcache.disable(self.target)
        return self.compared(draw, output), seconds

    def pictures(self, draw: Draw) -> list[torch.Tensor]:
        """Return the plain pictures of a draw, which are drawn where need be."""
        if id(draw) not in self._plain:
            self.plain(draw)
        return self._plain[id(draw)]

    def compared(self, draw: Draw, output: Any) -> list[float]:
        """Return the PSNR of each picture of an output."""
        pairs = zip(pictures_of(output), self.pictures(draw), strict=True)
        return [psnr(x, y) for x, y in pairs]

    @quietly()
    def note_changes(self, row: Row, draws: Sequence[Draw]) -> None:
        """Run a row as a guarded one, and keep the largest change of each cached call."""
        unknown = {lane: dict.fromkeys(_cached(mask), 1.0) for lane, mask in row.masks.items()}
        probe = Row(row.masks, row.weights, changes=unknown)
        dbcache.enable(self.target, schedule=self.content([probe]), guard=1e30)
        try:
            for draw in draws:
                draw(self.target)
                lanes = dbcache.summary(self.target, logging=False).lanes
                for lane, mask in row.masks.items():
                    own = [shown for shown in lanes if shown.branch == lane[1]]
                    shown = own[lane[0] * (len(own) // len(self.frame["transformers"]))]
                    total, known = 0.0, row.changes.setdefault(lane, {})
                    for call in range(len(mask)):
                        change = shown.diffs.get(call, 0.0)
                        total = 0.0 if mask[call] else total + max(change, 0.0)
                        if not mask[call]:
                            known[call] = max(known.get(call, 0.0), total)
        finally:
            dbcache.disable(self.target)


def _cached(mask: Sequence[int]) -> list[int]:
    return [call for call, full in enumerate(mask) if not full]


def timed(draw: Draw, target: Any) -> tuple[Any, float]:
    """Draw on a target; return what came back, and the seconds."""
    _wait()
    begun = time.perf_counter()
    output = draw(target)
    _wait()
    return output, time.perf_counter() - begun


def _wait() -> None:
    """Wait for the device, so that a clock reading means something."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def frame_of(
    target: Any, recorded: Any, models: Sequence[str], steps: int, snapshots: int
) -> dict[str, Any]:
    """Return what all rows of a file have in common."""
    pipe = getattr(target, "pipe", target)
    scheduler = getattr(pipe, "scheduler", None)
    calls: dict[int, int] = {}
    for (index, _), made in recorded.calls.items():
        calls[index] = max(calls.get(index, 0), len(made))
    timesteps = getattr(recorded.scheduler, "timesteps", None)
    return {
        "format": FORMAT,
        "pipeline": type(pipe).__name__,
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "scheduler_config": _settings(scheduler),
        "num_inference_steps": steps,
        "scheduler_steps": steps if timesteps is None else len(timesteps),
        "snapshots": snapshots,
        "transformers": [
            {"model": models[index], "calls": calls[index]} for index in sorted(calls)
        ],
        "versions": versions(),
    }


def _settings(scheduler: Any) -> dict[str, Any]:
    """Return the settings of a scheduler that are plain values."""
    config = getattr(scheduler, "config", {})
    plain = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and isinstance(value, plain)
    }


def front(rows: Sequence[Row], say: Callable[[str], None]) -> list[Row]:
    """Return rows in order, the most full steps first; of two the better one where both differ.

    A row with more full steps that is not better than one with fewer is left out: who asks for it
    gets the one with fewer, which is faster and better.
    """
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.full, -row.quality)):
        if kept and row.full == kept[-1].full:
            continue
        if kept and row.quality <= kept[-1].quality:
            say(
                f"{row.full:g} full steps ({row.quality:.1f} dB) are not better than "
                f"{kept[-1].full:g} ({kept[-1].quality:.1f} dB), which stand in for them"
            )
            continue
        kept.append(row)
    return kept[::-1]


def levels(rows: Sequence[Row]) -> dict[str, int]:
    """Return which rows the levels name: the first, the middle one and the last."""
    last = len(rows) - 1
    return {"high": 0, "balanced": last // 2, "fast": last}
