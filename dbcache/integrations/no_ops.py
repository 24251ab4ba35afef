"""Says in an engine's log which requests were not accelerated, and what to do about it."""

from __future__ import annotations

import logging
import threading

from dbcache.notices import nothing_cached
from dbcache.results.summary import Summary

MOST = 16
"""Kinds of requests that are said; after so many the log has told enough."""


NOT_RUN = "a request ran none of the blocks that are cached"


class NoOps:
    """Warns of requests without a cached step: once per length and reasons.

    Args:
        log: the engine's.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._said: set[object] = set()
        self._lock = threading.RLock()

    def look_at(self, summary: Summary) -> None:
        """Warn if a request that ended cached nothing."""
        lanes = summary.lanes
        texts = nothing_cached("a request", lanes) if lanes else summary.warnings or [NOT_RUN]
        kind = frozenset((lane.stack, lane.steps, *lane.counts) for lane in lanes)
        with self._lock:
            if not texts or kind in self._said or len(self._said) >= MOST:
                return
            self._said.add(kind)
        self._log.warning("dbcache: %s", "; ".join(texts))
