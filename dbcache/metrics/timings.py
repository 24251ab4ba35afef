"""Times and other figures of runs, from logs and summary files, and speed-ups from them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUMBER = r"([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)"


class Timings:
    """Figures of runs by the run's name and the figure's tag.

    Args:
        path: a log, or a summary file in JSON (`.json`, `.jsonl`). Of a log, lines count that hold
            the name of a run as a word and `tag: number`. JSON is an object of objects by name, or
            a list, or lines, of objects with a "name"; tags are the keys of their numbers.
        tags: what to read, as "time"; case does not matter.
        extra: text that a line must hold as well, of a log only.

    Raises:
        ValueError: not readable, or no line holds a tag.
    """

    def __init__(self, path: str, tags: Sequence[str], extra: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.tags = [tag.lower() for tag in tags]
        if not self.tags:
            raise ValueError(f"{path}: needs at least one tag to read; give -ptags, as -ptags time")
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: must be a text file in UTF-8 ({error})") from error
        if self.path.suffix.lower() in (".json", ".jsonl"):
            if extra:
                raise ValueError(f"{path}: -extra-ptags chooses lines of a log, this is JSON")
            self.entries: list[tuple[str, dict[str, float]]] = self._from_json(text)
            self.exact = True
        else:
            self.entries = self._from_log(text, extra)
            self.exact = False
        if not self.entries:
            raise ValueError(
                f"{path}: must hold one of {', '.join(self.tags)} with a number; has none"
            )

    def figures(self, name: str) -> dict[str, float]:
        """Return the mean of each tag over the entries of a run; a tag without one is left out."""
        word = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-])")
        found: dict[str, list[float]] = {}
        for entry, figures in self.entries:
            if entry == name if self.exact else word.search(entry):
                for tag, value in figures.items():
                    found.setdefault(tag, []).append(value)
        return {tag: math.fsum(values) / len(values) for tag, values in found.items()}

    def _from_log(self, text: str, extra: Sequence[str]) -> list[tuple[str, dict[str, float]]]:
        entries = []
        for line in text.splitlines():
            if not all(word.lower() in line.lower() for word in extra):
                continue
            figures = {}
            for tag in self.tags:
                found = re.search(
                    rf"(?<!\w){re.escape(tag)}\s*[:=]\s*{NUMBER}", line, re.IGNORECASE
                )
                if found:
                    figures[tag] = float(found[1])
            if figures:
                entries.append((line, figures))
        return entries

    def _from_json(self, text: str) -> list[tuple[str, dict[str, float]]]:
        try:
            if self.path.suffix.lower() == ".jsonl":
                data: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
            else:
                data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{self.path}: must be JSON ({error})") from error
        if isinstance(data, dict):
            data = [{"name": name, **run} for name, run in data.items() if isinstance(run, dict)]
        entries = []
        for run in data if isinstance(data, list) else []:
            if not isinstance(run, dict) or not isinstance(run.get("name"), str):
                raise ValueError(
                    f'{self.path}: every run must be an object with a "name", got {run!r}'
                )
            figures = {key.lower(): x for key, x in run.items() if _is_number(x)}
            if chosen := {tag: float(figures[tag]) for tag in self.tags if tag in figures}:
                entries.append((run["name"], chosen))
        return entries


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def ratio_heading(tag: str) -> str:
    """Return what baseline / run is called: fewer operations are not a speed-up."""
    return f"{tag} ratio" if "flop" in tag else "speed-up" if "time" in tag else f"{tag} speed-up"


def ratios(figures: dict[str, dict[str, float]], baseline: str) -> dict[str, dict[str, float]]:
    """Return baseline / run for every run and tag.

    Raises:
        ValueError: the baseline has no figures, or a figure is 0.
    """
    if not figures.get(baseline):
        known = ", ".join(sorted(name for name, own in figures.items() if own))
        raise ValueError(f"speed-up: the baseline must be one of {known}, got {baseline!r}")
    for name, own in figures.items():
        for tag, value in own.items():
            if value <= 0:
                raise ValueError(f"speed-up: {tag} of {name} must be above 0, got {value}")
    return {
        name: {
            tag: figures[baseline][tag] / x for tag, x in own.items() if tag in figures[baseline]
        }
        for name, own in figures.items()
    }
