"""`sweep`: many settings on one's own prompts, speed-up against quality.

Each draw is made without the cache and under each setting, in turn, so that a machine whose speed
drifts is the same for all. Records are written after each draw: a sweep that was cut off goes on
where it was, and a setting that is added costs its own draws only.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dbcache
from dbcache.adapters.requests.cached_transformer import handle_of
from dbcache.config.options import shown
from dbcache.config.predictors import CalibratorConfig
from dbcache.targets import enabled
from dbcache.targets import parts as parts_of
from dbcache.tuning.pictures import Draw, draws_of, pictures_of, psnr, similarity
from dbcache.tuning.progress import quietly, say
from dbcache.tuning.rows import Runner, timed

FORMAT = "dbcache sweep 1"


@dataclass(frozen=True)
class Result:
    """What one setting did, over all draws.

    Attributes:
        name: of the setting.
        line: what to call to use it.
        cached: mean share of cached steps.
        speedup: median of the plain time over the time with the cache; `low` and `high` its range.
        bound: what the speed-up would be if only the blocks that run took time.
        psnr: mean in dB; `psnr_low` the lowest picture's. ssim: mean, nan for what is no picture.
        lpips: mean, None where it was not asked for.
        draws: how many.
    """

    name: str
    line: str
    cached: float
    speedup: float
    low: float
    high: float
    bound: float
    psnr: float
    psnr_low: float
    ssim: float
    lpips: float | None
    draws: int


def line_of(options: Mapping[str, Any]) -> str:
    """Return the call of `enable` that sets these options, on one line."""

    def text(value: Any) -> str:
        if hasattr(value, "given"):
            given = ", ".join(f"{name}={entry!r}" for name, entry in value.given.items())
            return f"dbcache.{type(value).__name__}({given})"
        return repr(os.fspath(value)) if isinstance(value, os.PathLike) else repr(value)

    return f"dbcache.enable(pipe, {', '.join(f'{k}={text(v)}' for k, v in options.items())})"


def settings_of(who: str, settings: Any) -> dict[str, dict[str, Any]]:
    """Return settings by name.

    Args:
        who: what asks, for errors.
        settings: options of `enable`: by name, or a list, whose names are short ones made of them.

    Raises:
        TypeError: they are neither. ValueError: there are none, or two of a name.
    """
    if isinstance(settings, Mapping):
        found = {str(name): dict(options) for name, options in settings.items()}
    elif isinstance(settings, Sequence) and not isinstance(settings, str):
        found = {}
        for options in settings:
            if not isinstance(options, Mapping):
                raise TypeError(f"{who}: each setting must be a mapping, got {shown(options)}")
            name = _short(options)
            if name in found:
                raise ValueError(f"{who}: settings must differ, got {name} twice")
            found[name] = dict(options)
    else:
        raise TypeError(f"{who}: settings must be a mapping or a list, got {shown(settings)}")
    if not found:
        raise ValueError(f"{who}: settings must hold at least one, got none")
    return found


def _short(options: Mapping[str, Any]) -> str:
    words = []
    for name, value in options.items():
        if isinstance(value, CalibratorConfig):
            words.append(value.strify())
        elif value is True:
            words.append(name.removeprefix("enable_"))
        elif not isinstance(value, Mapping):
            end = Path(value).name if name in ("schedule", "calibration") else value
            words.append(f"{name} {end}" if name != "policy" else str(value))
    return ", ".join(words) or "defaults"


def sweep(
    target: Any,
    prompts: Any,
    settings: Any,
    *,
    num_inference_steps: int | None = None,
    path: str | os.PathLike[str] | None = None,
    lpips: bool = False,
    progress: bool = True,
    **options: Any,
) -> list[Result]:
    """Measure settings against plain calls, and return the fastest last.

        settings = [{"policy": "easycache", "enable_foca": True}, {"schedule": "flux.json"}]
        results = dbcache.sweep(pipe, prompts, settings, num_inference_steps=28, path="sweep.json")
        print(dbcache.sweep_table(results))

    Args:
        target: a pipeline, or a `BlockAdapter` with one; the cache is off before and after.
        prompts: as in `tune`; each is drawn without the cache and under every setting.
        settings: options of `enable`, by name or as a list.
        num_inference_steps: of the calls, where prompts are given.
        path: a JSON file of records; those it has of the same draw and settings are not made again.
        lpips: measure LPIPS, too, which needs the extra "metrics" and its weights.
        progress: print a line per cell, to stderr.
        **options: more arguments of the pipeline's calls.

    Raises:
        RuntimeError: the cache is on, or a draw is not the same twice. TypeError, ValueError:
            arguments that are not allowed, or a file of another kind.
    """
    found = settings_of("sweep", settings)
    draws = draws_of("sweep", prompts, num_inference_steps, options)
    if any(handle_of(part) is not None for part in parts_of(target)):
        raise RuntimeError("sweep: the cache must be off, got an enabled one; disable it first")
    records = Records(path)
    measure = _Measure(target, found, records, lpips=lpips, shows=progress)
    for number, draw in enumerate(draws):
        measure.all_of(number, draw)
    return sorted((records.result(name, found[name]) for name in found), key=lambda r: r.speedup)


class Records:
    """Cells that were measured: one per setting and draw.

    Args:
        path: the file that they are kept in; None: in memory.

    Raises:
        ValueError: the file is of another kind.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self.cells: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(
                    f"sweep: {self.path} must be of format {FORMAT!r}; choose another path"
                )
            self.cells = content["cells"]

    def has(self, line: str, draw: int) -> bool:
        """Whether a cell is there."""
        return any(cell["line"] == line and cell["draw"] == draw for cell in self.cells)

    def add(self, cell: dict[str, Any]) -> None:
        """Add a cell, and write the file."""
        self.cells.append(cell)
        if self.path is not None:
            lines = ",\n".join(f"  {json.dumps(each)}" for each in self.cells)
            text = f'{{\n "format": "{FORMAT}",\n "cells": [\n{lines}\n ]\n}}\n'
            self.path.write_text(text, encoding="utf-8")

    def result(self, name: str, options: Mapping[str, Any]) -> Result:
        """Return the cells of one setting together."""
        line = line_of(options)
        cells = [cell for cell in self.cells if cell["line"] == line]

        def mean(key: str) -> float:
            values = [x for cell in cells for x in cell[key]]
            return statistics.mean(values) if values else math.nan

        speeds = [cell["plain_seconds"] / cell["seconds"] for cell in cells]
        return Result(
            name,
            line,
            statistics.mean(cell["cached"] for cell in cells),
            statistics.median(speeds),
            min(speeds),
            max(speeds),
            statistics.mean(cell["bound"] for cell in cells),
            mean("psnr"),
            min(x for cell in cells for x in cell["psnr"]),
            mean("ssim"),
            mean("lpips") if all("lpips" in cell for cell in cells) else None,
            len(cells),
        )


class _Measure:
    """Fills the cells of a sweep."""

    def __init__(
        self,
        target: Any,
        settings: Mapping[str, dict[str, Any]],
        records: Records,
        *,
        lpips: bool,
        shows: bool,
    ) -> None:
        self.target, self.settings, self.records = target, settings, records
        self.lpips, self.shows = lpips, shows
        self.runner = Runner(target, {})

    def all_of(self, number: int, draw: Draw) -> None:
        """Measure what is missing of a draw; the settings take turns in who comes first."""
        todo = [
            (name, options)
            for name, options in self.settings.items()
            if not self.records.has(line_of(options), number)
        ]
        if not todo:
            return
        plain = self.runner.plain(draw)
        first = number % len(todo)
        for name, options in todo[first:] + todo[:first]:
            cell = self.cell(draw, options)
            cell |= {"line": line_of(options), "draw": number, "plain_seconds": plain}
            self.records.add(cell)
            if self.shows:
                say(
                    f"sweep: draw {number}, {name}: {plain / cell['seconds']:.2f}x, "
                    f"{statistics.mean(cell['psnr']):.1f} dB"
                )

    @quietly()
    def cell(self, draw: Draw, options: dict[str, Any]) -> dict[str, Any]:
        """Return what one draw under a setting gives."""
        dbcache.enable(self.target, **options)
        try:
            output, seconds = timed(draw, self.target)
            lanes = dbcache.summary(self.target, logging=False).lanes
            share = _share_run(self.target)
        finally:
            dbcache.disable(self.target)
        steps = sum(lane.steps for lane in lanes)
        cached = sum(len(lane.cached_steps) for lane in lanes) / max(1, steps)
        pairs = list(zip(pictures_of(output), self.runner.pictures(draw), strict=True))
        cell: dict[str, Any] = {
            "seconds": seconds,
            "cached": cached,
            "bound": 1 / (1 - cached + cached * share),
            "psnr": [min(psnr(x, y), 200.0) for x, y in pairs],
            "ssim": [s for x, y in pairs if not math.isnan(s := similarity(x, y))],
        }
        if self.lpips:
            cell["lpips"] = _lpips([x for x, _ in pairs], [y for _, y in pairs])
        return cell


def _share_run(target: Any) -> float:
    """Return the share of blocks that a cached step runs."""
    stacks = [stack for handle in enabled(target, "sweep") for stack in handle.setup.stacks]
    blocks = sum(stack.num_blocks for stack in stacks)
    return sum(stack.fn + stack.bn for stack in stacks) / max(1, blocks)


def _lpips(pictures: list[Any], references: list[Any]) -> list[float]:
    """Return LPIPS of pictures (H, W, C) in [0, 1]."""
    from dbcache.metrics import compute_lpips

    pairs = zip(references, pictures, strict=True)
    return [compute_lpips([y.numpy()], [x.numpy()])[0] for y, x in pairs]


def compare(target: Any, prompts: Any, **arguments: Any) -> Result:
    """Measure one setting against plain calls: `sweep` of one, whose options are `settings`.

    Args:
        target: as in `sweep`; so are the errors.
        prompts: as in `sweep`.
        **arguments: `settings`, a mapping of options of `enable`, and what `sweep` takes.
    """
    options = arguments.pop("settings", {})
    return sweep(target, prompts, {"this": options}, **arguments)[0]
