"""What all requests of this process add up to, per class of transformer: for operators."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from dbcache.adapters.requests.record import RequestRecord, Totals

_LOCK = threading.Lock()
_HANDLES: weakref.WeakSet[Any] = weakref.WeakSet()
_TOTALS: dict[str, Totals] = {}


def watch(handle: Any) -> None:
    """Count the bytes of a transformer's handle for as long as it lives."""
    with _LOCK:
        _HANDLES.add(handle)


def add(handle: Any, record: RequestRecord) -> None:
    """Count a request that closed; it counts on when its transformer is gone."""
    with _LOCK:
        totals = _TOTALS.setdefault(type(handle.module).__name__, Totals())
    totals.add(record)


def handles() -> list[Any]:
    """Return the handles that live."""
    with _LOCK:
        return list(_HANDLES)


def totals() -> dict[str, dict[str, int]]:
    """Return the sums of `Totals.read`, by the class of the transformer."""
    with _LOCK:
        known = dict(_TOTALS)
    return {name: found.read() for name, found in known.items()}
