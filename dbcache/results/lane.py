"""One lane of a request: which steps were cached, how much changed, why each was decided."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from dbcache.kernels.common.lane_state import Reason
from dbcache.notices import nothing_cached
from dbcache.results.cache_stats import CacheStats

REASONS = {reason: reason.name.lower().replace("_", " ") for reason in Reason} | {
    Reason.WARMUP: "warm-up",
    Reason.THRESHOLD_OFF: "threshold is 0",
    Reason.NAN: "NaN diff",
    Reason.THRESHOLD_ALWAYS: "threshold is 1 or more",
}
CACHED = frozenset(text for reason, text in REASONS.items() if reason.cached)
LIMITS = (Reason.COUNT_LIMIT, Reason.CONSECUTIVE_LIMIT, Reason.ACCUMULATED_LIMIT)
PERCENTILES = {"min": 0, "P25": 25, "P50": 50, "P75": 75, "P95": 95, "max": 100}


@dataclass(frozen=True)
class LaneSummary(CacheStats):
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
        host_megabytes: that part of `megabytes` which lies in host memory.
        always: blocks that run on a cached step, too.
        seconds: what each step's forward took, if `dbcache.profile` was on; else empty.
        options: the settings of the stack, by the names of their fields.
        short: name of the settings, for files and tables.
        part: attribute of the pipeline that holds the transformer, where it has several.
        other: the second guidance branch of the same stack, where this is the first.
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
    host_megabytes: float = 0.0
    always: int = 0
    seconds: list[float] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    short: str = ""
    part: str = ""
    other: LaneSummary | None = field(default=None, repr=False, compare=False)

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
    def name(self) -> str:
        """Stack and branch."""
        return f"{self.path} ({self.branch})" if self.branch else self.path

    @property
    def path(self) -> str:
        """The stack, with the transformer's name in the pipeline where that has several."""
        return f"{self.part}.{self.stack}" if self.part else self.stack

    @property
    def owner(self) -> str:
        """The transformer's class, with its name in the pipeline where that has several."""
        return f"{self.transformer} ({self.part})" if self.part else self.transformer

    def strify(self) -> str:
        """Return a short name of the settings and of how much was cached."""
        pruned = "" if self.pruned is None else f"_P{100 * self.pruned_ratio:.1f}"
        return f"{self.short}_S{len(self.cached_steps)}{pruned}"

    @property
    def counts(self) -> dict[str, int]:
        """How many steps each reason decided, most frequent first."""
        return dict(Counter(self.reasons).most_common())

    @property
    def why(self) -> str:
        """What decided, and how many steps each."""
        counts = ", ".join(f"{reason} {count}" for reason, count in self.counts.items())
        return f"as {self.follows}: {counts}" if self.follows else counts

    @property
    def percentiles(self) -> dict[str, float]:
        """Percentiles of the finite diffs, by linear interpolation; empty without any."""
        values = [diff for diff in self.diffs.values() if math.isfinite(diff)]
        if not values:
            return {}
        found = np.percentile(values, [*PERCENTILES.values()])
        return dict(zip(PERCENTILES, found.tolist(), strict=True))

    @property
    def warnings(self) -> list[str]:
        """What the user should know, each with what to do."""
        return self.remarks + nothing_cached(self.name, [self])

    @property
    def remarks(self) -> list[str]:
        """The warnings but for that of a lane that cached nothing."""
        if self.follows:
            return []  # those of the stack that decided say it all
        counts, who = self.counts, self.name
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
        limited = sum(counts.get(REASONS[reason], 0) for reason in LIMITS)
        if limited and self.cached_steps and not counts.get(REASONS[Reason.ABOVE_THRESHOLD], 0):
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
        own = [one.name for one in fields(self) if one.name != "other"]
        return {name: getattr(self, name) for name in own + derived}
