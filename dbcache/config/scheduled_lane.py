"""What a schedule says of one lane: which steps are full, and how the others are predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dbcache.kernels.common.lane_state import MAX_SLOTS

MAX_STEPS = 1024
"""Most steps of a schedule."""


@dataclass(frozen=True, slots=True)
class ScheduledLane:
    """The calls of one transformer under one guidance branch.

    Attributes:
        mask: one entry per call, 1 full and 0 cached; the first is 1.
        weights: for cached calls, by their number, a weight per snapshot, newest first, that adds
            up the residuals of the latest full calls. A call without an entry, or whose ring is
            another than the mask leaves, is predicted by FoCa.
        changes: for cached calls, the largest change since the last full call that was seen when
            the schedule was made (EasyCache's sum); empty where nothing was measured.
    """

    mask: tuple[int, ...]
    weights: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    changes: Mapping[int, float] = field(default_factory=dict)

    def ring_at(self, call: int, slots: int) -> list[int]:
        """Return the full calls before `call` that a ring of `slots` holds, newest first."""
        full = [i for i in range(call) if self.mask[i]]
        return full[: -slots - 1 : -1]

    def cut(self, skipped: int) -> ScheduledLane:
        """Return the schedule of a request that begins `skipped` calls later; its first is full.

        Weights stay where the ring holds the same calls as before.
        """
        cut = ScheduledLane((1, *self.mask[skipped + 1 :]))
        weights = {}
        for call, values in self.weights.items():
            before = [full - skipped for full in self.ring_at(call, len(values))]
            if call > skipped and before == cut.ring_at(call - skipped, len(values)):
                weights[call - skipped] = values
        later = range(skipped + 1, len(self.mask))
        changes = {i - skipped: self.changes[i] for i in later if i in self.changes}
        return ScheduledLane(cut.mask, weights, changes)

    def table(self, slots: int) -> list[list[float]]:
        """Return a row per call: the weights, and the calls that they are for, each MAX_SLOTS.

        Both are newest first. What is not used is 0 among the weights and -1 among the calls; a
        row that says nothing has no call.
        """
        rows = []
        for call in range(len(self.mask)):
            weights = self.weights.get(call, ())[:slots]
            ring = self.ring_at(call, slots) if weights else []
            room = MAX_SLOTS - len(ring)
            padded = [*weights[: len(ring)], *[0.0] * (MAX_SLOTS - min(len(weights), len(ring)))]
            rows.append([*padded, *map(float, ring), *[-1.0] * room])
        return rows
