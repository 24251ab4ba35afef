"""``dbcache sweep``: settings beside each other, speed-up against quality."""

from __future__ import annotations

import argparse
from pathlib import Path

from dbcache.cli import drawn
from dbcache.cli.outcome import Outcome, check_writable

HELP = "measure settings on prompts: speed-up, PSNR, SSIM, and the bound"

USUAL = (
    "preset=image:high", "preset=image:balanced", "preset=image:fast",
    "policy=easycache,residual_diff_threshold=0.05,enable_foca=true",
    "Fn_compute_blocks=1,residual_diff_threshold=0.12,enable_foca=true",
)  # fmt: skip
"""Settings where none are given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    drawn.add_arguments(parser)
    parser.add_argument(
        "--setting",
        action="append",
        metavar="NAME=VALUE,...",
        help="options of enable, preset=FAMILY:LEVEL, or a .yaml or schedule file; repeat it",
    )
    parser.add_argument("--out", type=Path, help="JSON file of records; a sweep goes on from it")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    parser.add_argument("--lpips", action="store_true", help="measure LPIPS, too")


def run(arguments: argparse.Namespace) -> Outcome:
    """Measure settings, and show the table."""
    from dataclasses import asdict

    import dbcache

    check_writable("--out", arguments.out)
    check_writable("--plot", arguments.plot)
    pipe, prompts, given = drawn.load(arguments)
    texts = arguments.setting or USUAL
    results = dbcache.sweep(
        pipe,
        prompts,
        {text: drawn.settings(text) for text in texts},
        path=arguments.out,
        lpips=arguments.lpips,
        **given,
    )
    if arguments.plot is not None:
        dbcache.sweep_plot(results, arguments.plot)
    return Outcome(dbcache.sweep_table(results), [asdict(result) for result in results])
