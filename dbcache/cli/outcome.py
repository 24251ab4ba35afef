"""What a command returns, and what several of them do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        text: for people.
        data: for ``--json``.
        code: exit code of the process.
    """

    text: str
    data: Any
    code: int = 0


def require(modules: Sequence[str], extra: str) -> None:
    """Raise an ImportError that names what is missing of `modules`, and the extra that has them."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"needs {', '.join(missing)}, not installed here: pip install 'dbcache-dit[{extra}]'"
        )


def pair(text: str) -> tuple[str, Any]:
    """Return name and value of ``name=value``; the value is read as JSON, or else is the text."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ValueError(f"options must be written as name=value, got {text!r}")
    known = {"true": True, "false": False, "none": None}
    if value.strip().lower() in known:
        return name.strip(), known[value.strip().lower()]
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()
