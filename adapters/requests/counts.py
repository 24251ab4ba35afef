"""What all requests of this process add up to, per class of transformer: for operators.

Without a lock, which an interrupt could leave taken: each line is one operation on a dictionary.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

from dbcache.adapters.requests.record import RequestRecord, Totals

_HANDLES: dict[int, weakref.ref[Any]] = {}
_TOTALS: dict[str, Totals] = {}


def watch(handle: Any) -> None:
    """Count the bytes of a transformer's handle for as long as it lives."""
    key = id(handle)
    _HANDLES[key] = weakref.ref(handle, lambda _: _HANDLES.pop(key, None))


def add(handle: Any, record: RequestRecord) -> None:
    """Count a request that closed; it counts on when its transformer is gone."""
    _TOTALS.setdefault(type(handle.module).__name__, Totals()).add(record)


def _free_locks() -> None:
    """Free what threads had locked that the child of a fork does not have."""
    holders: list[Any] = list(_TOTALS.values())
    locks = []
    for handle in handles():
        holders += [handle.views, handle.reruns, handle.compiled, handle.totals, handle._open]
        holders += [setup.lanes for setup in handle.setups]
        locks += [setup._learning for setup in handle.setups]
    for lock in [*locks, *(holder._lock for holder in holders)]:
        lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)


def handles() -> list[Any]:
    """Return the handles that live."""
    found = [reference() for reference in list(_HANDLES.values())]
    return [handle for handle in found if handle is not None]


def totals() -> dict[str, dict[str, int]]:
    """Return the sums of `Totals.read`, by the class of the transformer."""
    return {name: found.read() for name, found in dict(_TOTALS).items()}
