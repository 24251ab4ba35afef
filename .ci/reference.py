"""Writes docs/reference.md: all public names of dbcache with their signatures and docstrings.

python .ci/reference.py [FILE]
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import dbcache
from dbcache.exports import ALIASES, MODULES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference.md"


def signature_of(thing: Any) -> str:
    """Return the parameters of something callable; nothing where Python does not know them."""
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    return text.replace("'", "")


def block(text: str) -> str:
    """Return `text` as a block of code."""
    return "".join(f"    {line}".rstrip() + "\n" for line in text.splitlines())


def entry(name: str, thing: Any, level: int = 3) -> str:
    """Return the part of the page on one name, methods and properties included."""
    title = f"{'#' * level} {name}\n\n"
    what = f"class {name}" if inspect.isclass(thing) else name
    text = title + block(f"{what}{signature_of(thing)}") + "\n" + block(inspect.getdoc(thing) or "")
    if not inspect.isclass(thing):
        return text
    for method, value in vars(thing).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if method.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        given = "" if isinstance(value, property) else signature_of(function)
        text += "\n" + block(f".{method}{given}") + block(block(inspect.getdoc(function) or ""))
    return text


def page() -> str:
    """Return the whole page."""
    parts = ["# API reference\n\nAll that `import dbcache` offers, from the docstrings.\n"]
    aliases = {name: [a for a, own in ALIASES.items() if own == name] for name in ALIASES.values()}
    for module, names in sorted(MODULES.items()):
        parts.append(f"## dbcache.{module}\n")
        for name in names:
            parts.append(entry(name, getattr(dbcache, name)))
            if name in aliases:
                parts.append(f"Other names: {', '.join(f'`{x}`' for x in aliases[name])}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(page(), encoding="utf-8")
