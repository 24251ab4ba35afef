"""What a command returns, and what several of them do."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Of a pipeline; "auto" is bfloat16 on a GPU, float32 elsewhere."""


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


def check_writable(flag: str, path: Path | None) -> None:
    """Raise an OSError where a file cannot be written, or the folders above it not be made."""
    if path is None:
        return
    above = path.absolute()
    while not above.exists():
        above = above.parent
    if not os.access(above, os.W_OK) or (above != path.absolute() and not above.is_dir()):
        raise PermissionError(
            f"{flag}: {path} cannot be written, since {above} is no folder that may be written to; "
            f"choose another one"
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
