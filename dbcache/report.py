"""What a request did: which steps were cached, how much changed, and why each step was decided."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from dbcache.kernels.common.lane_state import Reason

REASONS = {
    Reason.WARMUP: "warm-up",
    Reason.MASK: "mask",
    Reason.COUNT_LIMIT: "count limit",
    Reason.CONSECUTIVE_LIMIT: "consecutive limit",
    Reason.ACCUMULATED_LIMIT: "accumulated limit",
    Reason.NO_REFERENCE: "no reference",
    Reason.SHAPE_CHANGED: "shape changed",
    Reason.THRESHOLD_OFF: "threshold is 0",
    Reason.NAN: "NaN diff",
    Reason.ABOVE_THRESHOLD: "above threshold",
    Reason.STATIC: "static",
    Reason.BELOW_THRESHOLD: "below threshold",
    Reason.THRESHOLD_ALWAYS: "threshold is 1 or more",
}
CACHED = frozenset(text for reason, text in REASONS.items() if reason.cached)
LIMITS = frozenset(
    REASONS[r] for r in (Reason.COUNT_LIMIT, Reason.CONSECUTIVE_LIMIT, Reason.ACCUMULATED_LIMIT)
)
PERCENTILES = (("min", 0), ("P25", 25), ("P50", 50), ("P75", 75), ("P95", 95), ("max", 100))


@dataclass(frozen=True)
class LaneSummary:
    """One lane's last request.

    Attributes:
        transformer: class name of the transformer.
        stack: name of the block stack.
        branch: guidance branch, None where there is only one.
        threshold: what the stack's changes are compared with.
        reasons: why each step was full or cached, by step.
        diffs: relative L1 change by step, for the steps that measured it.
        megabytes: size of the lane's buffers, 1e6 bytes.
        pruned: numbers of the blocks that were left out, by step; None where whole steps are
            cached.
        blocks: blocks of the stack.
        follows: the stack that decided for this one, None where it decides for itself.
        policy: what decided; the diffs of others than "dbcache" are what each step contributed to
            the sum that is compared.
    """

    transformer: str
    stack: str
    branch: str | None
    threshold: float
    reasons: list[str]
    diffs: dict[int, float]
    megabytes: float
    pruned: list[list[int]] | None = None
    blocks: int = 0
    follows: str | None = None
    policy: str = "dbcache"

    @classmethod
    def from_trace(cls, reasons: list[int], diffs: list[float], **attributes: Any) -> LaneSummary:
        """Build it from what the device recorded; a diff of -1 was not measured."""
        return cls(
            reasons=[REASONS[Reason(code)] for code in reasons],
            diffs={step: diff for step, diff in enumerate(diffs) if not diff < 0},
            **attributes,
        )

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.reasons)

    @property
    def cached_steps(self) -> list[int]:
        """The steps that were cached."""
        return [step for step, reason in enumerate(self.reasons) if reason in CACHED]

    @property
    def pruned_blocks(self) -> list[int]:
        """How many blocks were left out, by step; empty where whole steps are cached."""
        return [len(step) for step in self.pruned or ()]

    @property
    def pruned_ratio(self) -> float:
        """Calls of blocks that were left out over all calls of blocks; 0 without steps."""
        calls = self.blocks * self.steps
        return sum(self.pruned_blocks) / calls if calls else 0.0

    @property
    def counts(self) -> dict[str, int]:
        """How many steps each reason decided, most frequent first."""
        return dict(Counter(self.reasons).most_common())

    @property
    def percentiles(self) -> dict[str, float]:
        """Percentiles of the finite diffs, by linear interpolation; empty without any."""
        values = sorted(diff for diff in self.diffs.values() if math.isfinite(diff))
        return {name: _percentile(values, q) for name, q in PERCENTILES} if values else {}

    @property
    def warnings(self) -> list[str]:
        """What the user should know, each with what to do."""
        if self.follows:
            return []  # those of the stack that decided say it all
        counts, who = self.counts, f"{self.stack}{f' ({self.branch})' if self.branch else ''}"
        found = []
        nan = counts.get(REASONS[Reason.NAN], 0)
        if nan:
            cause = "the probe residual or its reference is zero or not finite"
            remedy = "try another Fn_compute_blocks"
            if self.policy != "dbcache":
                cause = f"what policy={self.policy!r} compares does not change or is not finite"
                remedy = "try another policy"
            found.append(
                f"{who}: {nan} diffs are NaN, those steps were computed; {cause}: {remedy}"
            )
        asked = [step for step, reason in enumerate(self.reasons) if reason not in _PLANNED]
        if asked and not self.cached_steps:
            finite = [diff for diff in self.diffs.values() if math.isfinite(diff)]
            least = f"the smallest diff was {min(finite):.3g}" if finite else "no diff was measured"
            found.append(
                f"{who}: the cache never hit; {least}, the threshold is {self.threshold:g}"
            )
        elif not asked and self.steps and not self.cached_steps:
            found.append(
                f"{who}: all {self.steps} steps were fixed as full by warm-up or mask; lower "
                f"max_warmup_steps (or run more steps) to cache"
            )
        limited = sum(counts.get(reason, 0) for reason in LIMITS)
        if limited and not counts.get(REASONS[Reason.ABOVE_THRESHOLD], 0):
            found.append(
                f"{who}: the threshold {self.threshold:g} never decided, the limits did "
                f"({limited} steps); lower it to let the diffs decide, or keep it if the fixed "
                f"rhythm is wanted"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as plain data."""
        derived = ["steps", "cached_steps", "counts", "percentiles", "warnings"]
        derived += ["pruned_blocks", "pruned_ratio"]
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


_PLANNED = frozenset((REASONS[Reason.WARMUP], REASONS[Reason.MASK]))


def _percentile(values: list[float], q: float) -> float:
    """Return the q-th percentile of sorted `values`."""
    position = (len(values) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


@dataclass(frozen=True)
class Summary:
    """All lanes of what the cache is enabled on; `print` shows it as a table.

    It is a sequence of its lanes, too.

    Attributes:
        lanes: those that ran in the last request.
        notes: warnings that belong to no single lane.
        details: whether its text lists each step.
        totals: of all closed requests: their number, steps, cached steps, and steps per reason.
        nbytes: bytes of all buffers, of open requests and of those kept for the next ones.
    """

    lanes: list[LaneSummary] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: bool = False
    totals: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0

    def __len__(self) -> int:
        return len(self.lanes)

    def __getitem__(self, index: int) -> LaneSummary:
        return self.lanes[index]

    def __bool__(self) -> bool:
        return True

    @property
    def warnings(self) -> list[str]:
        """All warnings."""
        return self.notes + [warning for lane in self.lanes for warning in lane.warnings]

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
            "totals": self.totals,
            "bytes": self.nbytes,
        }

    def _rows(self) -> list[list[str]]:
        prunes = any(lane.pruned is not None for lane in self.lanes)
        header = ["stack", "branch", "policy", "steps", "cached", *["pruned"] * prunes]
        rows = [[*header, *(name for name, _ in PERCENTILES), "why (steps)"]]
        for lane in self.lanes:
            diffs = lane.percentiles
            rows.append(
                [
                    lane.stack,
                    lane.branch or "-",
                    lane.policy,
                    str(lane.steps),
                    str(len(lane.cached_steps)),
                    *[f"{lane.pruned_ratio:.0%}" if lane.pruned is not None else "-"] * prunes,
                    *(f"{diffs[name]:.3f}" if diffs else "-" for name, _ in PERCENTILES),
                    f"as {lane.follows}: " * bool(lane.follows)
                    + ", ".join(f"{reason} {count}" for reason, count in lane.counts.items()),
                ]
            )
        return rows

    def _step_rows(self) -> list[list[str]]:
        """Return what happened on each step of each lane."""
        prunes = any(lane.pruned is not None for lane in self.lanes)
        rows = [["stack", "branch", "step", "why", "diff", *["pruned blocks"] * prunes]]
        for lane in self.lanes:
            for step, reason in enumerate(lane.reasons):
                diff = f"{lane.diffs[step]:.3f}" if step in lane.diffs else "-"
                row = [lane.stack, lane.branch or "-", str(step), reason, diff]
                left_out = lane.pruned[step] if lane.pruned is not None else []
                rows.append(row + [" ".join(map(str, left_out)) or "-"] * prunes)
        return rows

    def _tables(self) -> list[list[list[str]]]:
        return [self._rows(), self._step_rows()] if self.details else [self._rows()]

    def to_markdown(self) -> str:
        """Return Markdown: a table with one row per lane, and the warnings as a list.

        With `details` a second table has one row per step.
        """
        lines: list[str] = []
        for rows in self._tables():
            lines += [""] * bool(lines) + ["| " + " | ".join(row) + " |" for row in rows]
            lines.insert(len(lines) - len(rows) + 1, "|" + "---|" * len(rows[0]))
        return "\n".join(lines + [""] * bool(self.warnings) + [f"- {w}" for w in self.warnings])

    def __str__(self) -> str:
        if not self.lanes:
            return "\n".join(["dbcache: no step was run yet", *self.notes])
        lines: list[str] = []
        for rows in self._tables():
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            lines += [""] * bool(lines) + [
                "  ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
                for row in rows
            ]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])
