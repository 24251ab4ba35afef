"""``dbcache demo``: draws digits with a small trained model, plain and cached."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path

from dbcache.cli.outcome import Outcome, check_writable

HELP = "draw digits with and without the cache, and compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the image")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--per-digit", type=int, default=2, help="images of each digit")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, help="cpu or cuda; the GPU where there is one")


def run(arguments: argparse.Namespace) -> Outcome:
    """Run the demo; its picture and figures go into a folder."""
    for name in ("steps", "per_digit", "repeats"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    check_writable("--out", arguments.out)
    from dbcache.demo.run import run as run_demo

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        records = run_demo(
            arguments.out,
            steps=arguments.steps,
            per_digit=arguments.per_digit,
            repeats=arguments.repeats,
            seed=arguments.seed,
            device=arguments.device,
        )
    sys.stderr.flush()
    return Outcome(text.getvalue().rstrip(), records)
