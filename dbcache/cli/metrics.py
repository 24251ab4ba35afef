"""``dbcache metrics``: is ``dbcache-metrics``."""

from __future__ import annotations

import argparse

from dbcache.cli.outcome import Outcome

HELP = "PSNR, SSIM, LPIPS, FID and scores for prompts; `dbcache metrics --help` has its options"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: `dbcache-metrics` has a parser of its own."""


def run(arguments: argparse.Namespace) -> Outcome:
    """Raise: the command line was handed over before."""
    raise NotImplementedError("`dbcache metrics` is run by dbcache.metrics.cli")
