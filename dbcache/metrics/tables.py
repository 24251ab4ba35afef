"""Tables of results: as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from typing import Any

Value = float | int | str | None


@dataclass(frozen=True, slots=True)
class Column:
    """One column: key in the rows, heading, digits behind the point, which end is better."""

    key: str
    heading: str
    digits: int | None = None
    higher: bool | None = None
    unit: str = ""

    def text(self, value: Value) -> str:
        if value is None:
            return ""
        if isinstance(value, float) and self.digits is not None:
            return f"{value:.{self.digits}f}" + self.unit
        return str(value)

    @property
    def title(self) -> str:
        return self.heading + {None: "", True: " ↑", False: " ↓"}[self.higher]


@dataclass(slots=True)
class Table:
    """Rows of values by the keys of the columns; a value may be missing."""

    columns: list[Column]
    rows: list[dict[str, Value]]
    facts: dict[str, Any] = field(default_factory=dict)
    """What JSON says beside the rows."""

    def sort(self, column: Column) -> None:
        """Put the best rows first; those without a value come last."""

        def key(row: dict[str, Value]) -> tuple[bool, float]:
            value = row.get(column.key)
            if not isinstance(value, (int, float)):
                return True, 0.0
            return False, -value if column.higher else value

        self.rows.sort(key=key)

    def cells(self) -> list[list[str]]:
        """Return titles and rows as text."""
        titles = [column.title for column in self.columns]
        body = [[c.text(row.get(c.key)) for c in self.columns] for row in self.rows]
        return [titles, *body]

    def to_text(self) -> str:
        """Return aligned columns, numbers to the right."""
        cells = self.cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = []
        for row in cells:
            padded = [row[0].ljust(widths[0])]
            padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(padded).rstrip())
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Return a table of GitHub's Markdown."""
        titles, *body = [[cell.replace("|", "\\|") for cell in row] for row in self.cells()]
        rule = ["---", *["---:"] * (len(titles) - 1)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *body))

    def to_csv(self) -> str:
        """Return comma-separated values, keys in the first line, numbers in full."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        keys = [column.key for column in self.columns]
        writer.writerow(keys)
        writer.writerows([_exact(row.get(key)) for key in keys] for row in self.rows)
        return out.getvalue().rstrip("\n")

    def to_json(self) -> str:
        """Return an object with `rows`, numbers in full; infinite ones are the text "inf"."""
        rows = [{key: _exact(value) for key, value in row.items()} for row in self.rows]
        return json.dumps(
            {**self.facts, "rows": rows}, indent=2, ensure_ascii=False, allow_nan=False
        )


def _exact(value: Value) -> Value:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
