"""What a request did, over all lanes: text, Markdown, plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from dbcache.notices import nothing_cached
from dbcache.results.drawing import Plot, timelines
from dbcache.results.gathering import lanes_from
from dbcache.results.lane import PERCENTILES, LaneSummary
from dbcache.results.markup import columns, table
from dbcache.results.plain import plain

KEPT = ("totals", "name", "config", "seconds")
"""Fields that plain data has under their own names."""


@dataclass(frozen=True)
class Summary:
    """All lanes of what the cache is enabled on; `print` and notebooks show it as a table.

    It is a sequence of its lanes, too.

    Attributes:
        lanes: those that ran in the last request.
        notes: warnings that belong to no single lane.
        details: whether its text lists each step.
        totals: of all closed requests: their number, steps, cached steps, and steps per reason.
        nbytes: bytes of all buffers, of open requests and of those kept for the next ones.
        name: class of the pipeline or transformer.
        config: Python that enables the cache with the same settings.
        seconds: what the last call of the pipeline took on the host; None without one.
        has_run: calls were made, with the cache or without.
    """

    lanes: list[LaneSummary] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: bool = False
    totals: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    name: str = ""
    config: str = ""
    seconds: float | None = None
    has_run: bool = False

    def __repr__(self) -> str:
        steps = sum(lane.steps for lane in self.lanes)
        cached = sum(len(lane.cached_steps) for lane in self.lanes)
        return f"<Summary of {self.name}: {len(self)} lanes, {cached} of {steps} steps cached>"

    def __len__(self) -> int:
        return len(self.lanes)

    def __getitem__(self, index: int) -> LaneSummary:
        return self.lanes[index]

    def __bool__(self) -> bool:
        return True

    @property
    def warnings(self) -> list[str]:
        """All warnings; one for each transformer that cached nothing in all of its lanes."""
        found = list(self.notes)
        for name in dict.fromkeys(lane.owner for lane in self.lanes):
            lanes = [lane for lane in self.lanes if lane.owner == name]
            idle = nothing_cached(name, lanes)
            found += idle + [text for x in lanes for text in (x.remarks if idle else x.warnings)]
        return found

    @property
    def cached_fraction(self) -> float:
        """Cached steps over steps, over all lanes; 0 without steps."""
        steps = sum(lane.steps for lane in self.lanes)
        return sum(len(lane.cached_steps) for lane in self.lanes) / steps if steps else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as plain data."""
        return {
            "lanes": [lane.to_dict() for lane in self.lanes],
            "cached_fraction": self.cached_fraction,
            "warnings": self.warnings,
            "bytes": self.nbytes,
            **{name: getattr(self, name) for name in KEPT},
        }

    def to_json(self, indent: int | None = 1) -> str:
        """Return everything as JSON; a change that is no number is null.

        Args:
            indent: spaces per level; None: one line.
        """
        return json.dumps(plain(self.to_dict()), indent=indent)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Summary:
        """Return the summary of which `to_dict` or the JSON of `to_json` was made.

        Raises:
            KeyError, TypeError: something is missing in it, or of another kind.
        """
        lanes = lanes_from(data["lanes"])
        of_lanes = {warning for lane in lanes for warning in lane.warnings}
        return cls(
            lanes,
            [warning for warning in data["warnings"] if warning not in of_lanes],
            nbytes=data["bytes"],
            totals=dict(data["totals"]),
            **{name: data[name] for name in KEPT[1:]},
        )

    def strify(self) -> str:
        """Return the short name of the first lane; "" without one."""
        return self.lanes[0].strify() if self.lanes else ""

    def plot(self) -> Plot:
        """Return a drawing of the changes by step, a panel per lane.

        Notebooks show it; its `save` writes an SVG file.
        """
        return Plot(timelines(self.lanes))

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        head, *rows = self._rows()
        warnings = [[warning] for warning in self.warnings]
        shown = table(head, rows) + (table(["warning"], warnings) if warnings else "")
        return f"<div><p>{escape(self._title())}</p>{shown}{timelines(self.lanes)}</div>"

    def _title(self) -> str:
        return f"Cache steps and diffs: {self.name}" if self.name else "Cache steps and diffs"

    def _rows(self) -> list[list[str]]:
        prunes = any(lane.pruned is not None for lane in self.lanes)
        header = ["stack", "branch", "policy", "steps", "cached", *["pruned"] * prunes]
        rows = [[*header, *PERCENTILES, "why (steps)"]]
        for lane in self.lanes:
            diffs, row = lane.percentiles, [lane.path, lane.branch or "-", lane.policy]
            row += [str(lane.steps), str(len(lane.cached_steps))]
            row += [f"{lane.pruned_ratio:.0%}" if lane.pruned is not None else "-"] * prunes
            row += [f"{diffs[name]:.3f}" if diffs else "-" for name in PERCENTILES]
            rows.append([*row, lane.why])
        return rows

    def _step_rows(self) -> list[list[str]]:
        """Return what happened on each step of each lane."""
        prunes = any(lane.pruned is not None for lane in self.lanes)
        rows = [["stack", "branch", "step", "why", "diff", *["pruned blocks"] * prunes]]
        for lane in self.lanes:
            for step, reason in enumerate(lane.reasons):
                diff = f"{lane.diffs[step]:.3f}" if step in lane.diffs else "-"
                row = [lane.path, lane.branch or "-", str(step), reason, diff]
                left_out = lane.pruned[step] if lane.pruned is not None else []
                rows.append(row + [" ".join(map(str, left_out)) or "-"] * prunes)
        return rows

    def to_markdown(self) -> str:
        """Return Markdown: a table with one row per lane, and the warnings as a list.

        With `details` it has a title, and a second table with one row per step.
        """
        lines = [self._title()] * self.details
        for rows in [self._rows(), *[self._step_rows()] * self.details]:
            lines += [""] * bool(lines) + ["| " + " | ".join(row) + " |" for row in rows]
            lines.insert(len(lines) - len(rows) + 1, "|" + "---|" * len(rows[0]))
        return "\n".join(lines + [""] * bool(self.warnings) + [f"- {w}" for w in self.warnings])

    def __str__(self) -> str:
        if not self.lanes:
            what = "no step ran with the cache" if self.has_run else "no step was run yet"
            return "\n".join([f"dbcache: {what}", *self.notes])
        if self.details:
            return self.to_markdown()
        lines = [columns(self._rows())]
        held = sum(lane.host_megabytes for lane in self.lanes)
        lines += [f"in host memory: {held:.3f} MB of stored residuals"] * (held > 0)
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])
