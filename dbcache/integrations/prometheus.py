"""`dbcache.counters` as Prometheus metrics, in the registry that an engine exposes.

Engines run their models in worker processes and expose metrics in another. Where
PROMETHEUS_MULTIPROC_DIR is set before they start, prometheus_client adds up those of all processes.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

LOGGER = logging.getLogger("dbcache")

_failed: type[Exception] | None = None
"""What kept metrics from being published, as it was last said."""
_LOCK = threading.RLock()  # a signal's handler may publish, too
_PUBLISHED: weakref.WeakKeyDictionary[Any, _Metrics] = weakref.WeakKeyDictionary()

_COUNTERS = {
    "dbcache_requests": ("Requests that ended", ("model",)),
    "dbcache_requests_without_cached_steps": ("Requests that cached nothing", ("model",)),
    "dbcache_steps": ("Steps of lanes, by whether they were cached", ("model", "kind")),
    "dbcache_decisions": ("Steps of lanes, by what decided", ("model", "reason")),
}
"""Per metric what it counts, and its labels."""


class _Metrics:
    """The metrics of one registry, and what they were last brought up to."""

    def __init__(self, registry: Any) -> None:
        from prometheus_client import Counter, Gauge

        self._counters = {
            name: Counter(name, text, labels, registry=registry)
            for name, (text, labels) in _COUNTERS.items()
        }
        self._bytes = Gauge(
            "dbcache_buffer_bytes",
            "Bytes of the buffers of requests",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._last: dict[tuple[str, ...], int] = {}

    def bring_up_to(self, counts: Mapping[str, Mapping[str, Any]]) -> None:
        for name, *labels, value in _values(counts):
            key = name, *labels
            last = self._last.get(key, 0)  # more than `value`, where another thread was faster
            self._last[key] = max(value, last)
            self._counters[name].labels(*labels).inc(max(0, value - last))
        for model, found in counts.items():
            self._bytes.labels(model).set(found["bytes"])


def _values(counts: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Yield metric, labels and value."""
    for model, found in counts.items():
        for name in ("requests", "requests_without_cached_steps"):
            yield f"dbcache_{name}", model, found[name]
        for kind in ("full", "cached"):
            yield "dbcache_steps", model, kind, found[f"steps_{kind}"]
        for reason, count in found["reasons"].items():
            yield "dbcache_decisions", model, reason, count


def publish_where_installed() -> None:
    """Do what `publish` does, if prometheus_client is there: what backends do after a request.

    What goes wrong is said once, in the log: no image fails for its metrics.
    """
    global _failed
    if importlib.util.find_spec("prometheus_client") is None:
        return
    try:
        publish()
    except Exception as error:
        if type(error) is not _failed:
            _failed = type(error)
            LOGGER.warning(
                "dbcache: metrics are not published: %s: %s; make the folder that "
                "PROMETHEUS_MULTIPROC_DIR names before the engine starts, and see that nothing "
                "else registers dbcache's names",
                type(error).__name__,
                error,
            )


def publish(registry: Any = None, counts: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Bring the metrics of a registry up to the counters; makes them the first time.

    Args:
        registry: a `prometheus_client.CollectorRegistry`; None: the one that engines expose.
        counts: of `dbcache.counters`; None: those of this process.

    Raises:
        ImportError: prometheus_client is missing.
    """
    prometheus_client = _client()
    if counts is None:
        from dbcache.totals import counters

        counts = counters()
    if registry is None:
        registry = prometheus_client.REGISTRY
    with _LOCK:
        metrics = _PUBLISHED.get(registry)
        if metrics is None:
            metrics = _PUBLISHED[registry] = _Metrics(registry)
        metrics.bring_up_to(counts)


def text() -> str:
    """Return the counters of this process in Prometheus' text format.

    Raises:
        ImportError: prometheus_client is missing.
    """
    prometheus_client = _client()
    registry = prometheus_client.CollectorRegistry()
    publish(registry)
    found: bytes = prometheus_client.generate_latest(registry)
    return found.decode()


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise ImportError(
            "dbcache.integrations.prometheus needs prometheus_client; pip install prometheus-client"
        ) from error
    return prometheus_client
