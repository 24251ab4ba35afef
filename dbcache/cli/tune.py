"""``dbcache tune``: a speed or a quality in, a schedule file out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbcache.cli import drawn
from dbcache.cli.outcome import Outcome
from dbcache.results.markup import columns

HELP = "find which steps to run in full, for a speed, a quality or a number of steps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    drawn.add_arguments(parser, several=True)
    parser.add_argument("--speedup", type=float, nargs="+", help="as in 2.0")
    parser.add_argument("--psnr", type=float, nargs="+", help="in dB, on prompts held out")
    parser.add_argument("--full-steps", type=int, nargs="+", help="how many steps run in full")
    parser.add_argument("--minutes", type=float, default=30.0, help="time at most (default: 30)")
    parser.add_argument("--out", type=Path, default=Path("schedule.json"), help="the file to write")
    parser.add_argument("--per-branch", action="store_true", help="a mask per guidance branch")
    parser.add_argument("--guard", action="store_true", help="keep how much the steps move")


def run(arguments: argparse.Namespace) -> Outcome:
    """Tune, and show the rows."""
    import dbcache

    pipe, prompts, given = drawn.load(arguments)
    content = dbcache.tune(
        pipe,
        prompts,
        target_speedup=arguments.speedup,
        target_psnr=arguments.psnr,
        full_steps=arguments.full_steps,
        budget_minutes=arguments.minutes,
        path=arguments.out,
        per_branch=arguments.per_branch,
        guard=arguments.guard,
        **given,
    )
    rows = [["of", "full", "speed-up", "range", "PSNR dB", "lowest", "steps"]]
    for each in (content, *content.get("others", ())):
        rows += [_line(each["num_inference_steps"], row) for row in each["rows"]]
    held = "held out" if content["held_out"] else "that were calibrated on"
    text = (
        f"{columns(rows)}\n\n{content['calibrated_on']} draws calibrated on, quality on "
        f"{content['validated_on']} {held}, {content['seconds']} s\n"
        f"dbcache.enable(pipe, schedule={str(arguments.out)!r})"
    )
    return Outcome(text, content)


def _line(steps: int, row: Mapping[str, Any]) -> list[str]:
    """Return a row of a schedule as the table has it."""
    speed, psnr = row.get("speedup", {}), row.get("psnr", {})
    mask = next(iter(row["transformers"][0].values()))["mask"]
    return [
        str(steps), str(row["full"]), f"{speed.get('expected', 0):.2f}x",
        f"{speed.get('low', 0):.2f}-{speed.get('high', 0):.2f}", f"{psnr.get('mean', 0):.1f}",
        f"{psnr.get('low', 0):.1f}", mask,
    ]  # fmt: skip
