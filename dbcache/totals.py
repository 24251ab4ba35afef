"""Counters for operators: what the cache did since the process began, per model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dbcache.adapters.requests import counts, overview
from dbcache.targets import enabled

_REASON = "reason: "


def counters(target: object | None = None) -> dict[str, dict[str, Any]]:
    """Return what all closed requests add up to, by the class of the transformer.

    Reads closed requests back from the device, each once.

    Args:
        target: a pipeline, a transformer or a `BlockAdapter` that is enabled: what ran on it since
            then. None: all that ran in this process, also on models that are gone.

    Returns:
        Per class a dictionary with `requests`; `requests_without_cached_steps`, on which the cache
        did nothing; `steps_full` and `steps_cached`, summed over lanes (a block stack and a
        guidance branch); `reasons`, how many steps each reason decided; and `bytes`, which the
        buffers of all requests that are open and of those kept for the next ones have now.

    Raises:
        RuntimeError: the cache is not enabled on `target`.
    """
    handles = counts.handles() if target is None else enabled(target, "counters")
    sums: dict[str, Counter[str]] = {}
    if target is None:
        sums = {name: Counter(found) for name, found in counts.totals().items()}
    else:
        for handle in handles:
            sums.setdefault(type(handle.module).__name__, Counter()).update(handle.totals.read())
    nbytes: Counter[str] = Counter()
    for handle in handles:
        nbytes[type(handle.module).__name__] += overview.nbytes(handle)
    return {name: _shown(sums.get(name, {}), nbytes[name]) for name in {**sums, **nbytes}}


def _shown(sums: Mapping[str, int], nbytes: int) -> dict[str, Any]:
    steps, cached = sums.get("steps", 0), sums.get("cached_steps", 0)
    return {
        "requests": sums.get("requests", 0),
        "requests_without_cached_steps": sums.get("requests_without_cached_steps", 0),
        "steps_full": steps - cached,
        "steps_cached": cached,
        "reasons": {
            name.removeprefix(_REASON): count
            for name, count in sums.items()
            if name.startswith(_REASON)
        },
        "bytes": nbytes,
    }
