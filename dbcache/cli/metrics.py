"""``dbcache metrics``: is ``dbcache-metrics``, whose parser takes all that follows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

HELP = "PSNR, SSIM, LPIPS, FID and scores for prompts; `dbcache metrics --help` has its options"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: `dbcache-metrics` has a parser of its own."""


def main(argv: Sequence[str]) -> int:
    """Run the command line of ``dbcache-metrics``; return its exit code."""
    from dbcache.metrics.cli import main as run_metrics

    return run_metrics(argv)
