"""Text files of settings: errors that name the file and say what to do."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dbcache.config.options import LONGEST

TWICE = "the key {key!r} twice in one place, of which only one can hold"


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
        if yaml:
            return _parse_yaml(who, path, text)
        return parse_json(text)
    except RecursionError as error:
        raise ValueError(
            f"{who}: {path} must be {language} of a few levels, got a deeply nested one; flatten it"
        ) from error
    except ValueError as error:
        got = str(error)[:LONGEST]
        raise ValueError(f"{who}: {path} must be {language}, got {got}; mend it there") from error


def format_of(content: Any) -> Any:
    """Return the format that the content of a file says it has, for errors its type without one."""
    return content.get("format") if isinstance(content, Mapping) else type(content).__name__


def parse_json(text: str) -> Any:
    """Return what JSON holds.

    Raises:
        ValueError: it is none, or an object has a key twice.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of an object.

    Raises:
        ValueError: a key is there twice, of which JSON and YAML would keep the last value.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(TWICE.format(key=next(key for key in counts if counts[key] > 1)))
    return found


def _nodes(root: Any) -> Iterator[Any]:
    """Yield a node of a YAML document and those beneath it, each once."""
    seen: set[int] = set()
    ahead = [root]
    while ahead:
        node = ahead.pop()
        if id(node) in seen or node is None:
            continue
        seen.add(id(node))
        yield node
        value = node.value if isinstance(node.value, list) else []
        ahead += [x for part in value for x in (part if isinstance(part, tuple) else (part,))]


def _parse_yaml(who: str, path: str | os.PathLike[str], text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            f"{who}: PyYAML must be installed to read {Path(path).name}: "
            f"pip install 'dbcache-dit[yaml]'; or give a .json file or a dict"
        ) from error
    try:
        for node in _nodes(yaml.compose(text, Loader=yaml.SafeLoader)):
            if isinstance(node, yaml.MappingNode):
                _once([(key.value, None) for key, _ in node.value if key.id == "scalar"])
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
