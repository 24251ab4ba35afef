"""Command line: ``dbcache COMMAND ...``.

Each command is a module of this package, named in `COMMANDS`. It has `HELP`, one line;
`add_arguments(parser)`; and `run(arguments)`, which returns an `Outcome` (`metrics` has a `main`
instead). Nothing is imported at the top of it but the standard library, so that help needs no
torch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import dbcache
from dbcache.cli import metrics
from dbcache.cli.outcome import Outcome
from dbcache.command import FAILED, run_command
from dbcache.foreign import explanation

COMMANDS = (
    "demo",
    "generate",
    "tune",
    "sweep",
    "compare",
    "report",
    "models",
    "masks",
    "metrics",
    "info",
)
"""Modules of this package."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    main_parser = argparse.ArgumentParser(
        prog="dbcache", description="Cache for diffusion transformers", allow_abbrev=False
    )
    main_parser.add_argument(
        "--version", action="version", version=f"dbcache {dbcache.__version__}"
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"dbcache.cli.{name}")
        sub = commands.add_parser(
            name, help=module.HELP, description=module.HELP, allow_abbrev=False
        )
        module.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print data as JSON")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit code: 0, 1 after an error, 130 after Ctrl-C.

    A wrong command line raises SystemExit(2), as argparse does.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    foreign = explanation()
    if foreign is not None:
        print(f"dbcache: {foreign}", file=sys.stderr)
        return FAILED
    if given[:1] == ["metrics"]:  # has a parser of its own
        return metrics.main(given[1:])
    arguments = parser().parse_args(given)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of optional parts

    def body() -> int:
        module = importlib.import_module(f"dbcache.cli.{arguments.command}")
        outcome: Outcome = module.run(arguments)
        if outcome.text:
            print(_json(outcome.data) if arguments.json else outcome.text)
        return outcome.code

    return run_command(f"dbcache {arguments.command}", body, arguments.debug)


def _json(data: Any) -> str:
    from dbcache.results.plain import plain

    return json.dumps(plain(data), indent=1)
