"""Text files of settings: errors that name the file and say what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dbcache.config.options import LONGEST


def read(who: str, path: str | os.PathLike[str], *, yaml: bool = False) -> Any:
    """Return what a JSON file, or a YAML file, holds.

    Args:
        who: what reads it, for errors.
        path: the file.
        yaml: read YAML rather than JSON.

    Raises:
        ValueError: it is not text in UTF-8, or not of that format. OSError: it cannot be read.
        ImportError: PyYAML is needed and missing.
    """
    language = "YAML" if yaml else "JSON"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{who}: {path} must be text in UTF-8, got {error}; save it so") from error
    try:
        return _parse_yaml(who, path, text) if yaml else json.loads(text)
    except RecursionError as error:
        raise ValueError(
            f"{who}: {path} must be {language} of a few levels, got a deeply nested one; flatten it"
        ) from error
    except ValueError as error:
        got = str(error)[:LONGEST]
        raise ValueError(f"{who}: {path} must be {language}, got {got}; mend it there") from error


def _parse_yaml(who: str, path: str | os.PathLike[str], text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            f"{who}: PyYAML must be installed to read {Path(path).name}: "
            f"pip install 'dbcache-dit[yaml]'; or give a .json file or a dict"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
