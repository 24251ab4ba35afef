"""``dbcache models``: the transformer classes that are known by name."""

from __future__ import annotations

import argparse

from dbcache.cli.outcome import Outcome
from dbcache.results.markup import columns

HELP = "list the models that are known by name, and what tests cover of each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("name", nargs="?", default="", help="part of a model's or class's name")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")


def run(arguments: argparse.Namespace) -> Outcome:
    """List the models."""
    import dbcache

    lines = dbcache.supported_matrix().splitlines()
    wanted = arguments.name.lower()
    kept = [line for line in lines[2:] if wanted in line.lower()]
    refused = _refused(wanted)
    if not kept and not refused:
        raise ValueError(
            f"no model is called {arguments.name!r}; `dbcache models` lists all. Others work "
            f"through a BlockAdapter, see docs/options.md"
        )
    table = [line.strip("|").split("|") for line in (lines[0], *kept)]
    head, *rows = [[cell.strip().strip("`") for cell in line] for line in table]
    keys = [name.lower().replace(" ", "_") for name in head]
    data = [
        {key: cell if i < 2 else cell == "✅" for i, (key, cell) in enumerate(pairs)}
        for pairs in (zip(keys, row, strict=True) for row in rows)
    ]
    text = (
        "\n".join([*lines[:2], *kept])
        if arguments.markdown
        else columns([head, *[[c.replace("✅", "yes") for c in row] for row in rows]])
    )
    text += "".join(f"\nrefused: {name} {reason}" for name, reason in refused.items())
    return Outcome(text, {"models": data, "refused": refused})


def _refused(wanted: str) -> dict[str, str]:
    """Return the classes that cannot be cached, where one is asked for."""
    from dbcache.adapters.models.table import REFUSED

    return {name: why for name, why in REFUSED.items() if wanted and wanted in name.lower()}
