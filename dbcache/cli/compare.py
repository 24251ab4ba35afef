"""``dbcache compare``: one setting against plain calls."""

from __future__ import annotations

import argparse

from dbcache.cli import drawn
from dbcache.cli.outcome import Outcome

HELP = "measure one setting, or a schedule, against plain calls"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    drawn.add_arguments(parser)
    parser.add_argument("--setting", default="", metavar="NAME=VALUE,...", help="as in sweep")
    parser.add_argument("--lpips", action="store_true", help="measure LPIPS, too")


def run(arguments: argparse.Namespace) -> Outcome:
    """Measure the setting, and show it."""
    from dataclasses import asdict

    import dbcache

    pipe, prompts, given = drawn.load(arguments)
    found = drawn.settings(arguments.setting)
    result = dbcache.compare(pipe, prompts, settings=found, lpips=arguments.lpips, **given)
    return Outcome(dbcache.sweep_table([result]), asdict(result))
