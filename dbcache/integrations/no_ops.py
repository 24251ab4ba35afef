"""Says in an engine's log which requests were not accelerated, and what to do about it."""

from __future__ import annotations

import logging
import threading

from dbcache.results.summary import Summary

MOST = 16
"""Kinds of requests that are said; after so many the log has told enough."""


class NoOps:
    """Warns of requests without a cached step: once per length and reasons.

    Args:
        log: the engine's.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._said: set[object] = set()
        self._lock = threading.Lock()

    def look_at(self, summary: Summary) -> None:
        """Warn if a request that ended cached nothing."""
        lanes = summary.lanes
        if any(lane.cached_steps or lane.pruned_ratio for lane in lanes):
            return
        kind = frozenset((lane.stack, lane.steps, *lane.counts) for lane in lanes)
        with self._lock:
            if kind in self._said or len(self._said) >= MOST:
                return
            self._said.add(kind)
        why = "; ".join(summary.warnings) or "its blocks were not run"
        self._log.warning("dbcache: a request ran without a cached step: %s", why)
