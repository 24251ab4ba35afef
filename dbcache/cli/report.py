"""``dbcache report``: the page of a request that `dbcache generate --summary` kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dbcache.cli.outcome import Outcome, check_writable

HELP = "make an HTML page of a summary that `dbcache generate --summary` or to_json() wrote"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("summary", type=Path, help="a JSON file")
    parser.add_argument("--out", type=Path, help="the page (default: beside it, ending in .html)")


def run(arguments: argparse.Namespace) -> Outcome:
    """Write the page; its text is the summary."""
    from dbcache.results.page import page
    from dbcache.results.summary import Summary

    file: Path = arguments.summary
    out = file.with_suffix(".html") if arguments.out is None else arguments.out
    check_writable("--out", out)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        summary = Summary.from_dict(data.get("summary", data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: must be the JSON of a summary, got {type(error).__name__}: {error}"
        ) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(summary), encoding="utf-8")
    return Outcome(f"{summary}\nReport: {out}", {"report": str(out)})
