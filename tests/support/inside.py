"""Looks inside a transformer whose cache is on: its stacks, and what its latest request keeps."""

from typing import Any

from dbcache.adapters.requests.cached_transformer import CachedTransformer
from dbcache.adapters.requests.context import current_place
from dbcache.adapters.requests.request import Request


def handle(target: Any) -> CachedTransformer:
    """Return the handle of a transformer, or of what holds one."""
    return vars(getattr(target, "transformer", target))["_dbcache"]


def request(target: Any) -> Request:
    """Return the request of this thread that nobody started."""
    return handle(target).implicit[current_place()]


class InsideStack:
    """One stack, with what the latest request keeps of it: attributes of both."""

    def __init__(self, stack: Any, run: Any) -> None:
        self._parts = [run, stack]

    def __getattr__(self, name: str) -> Any:
        for part in self._parts:
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(name)


def stacks(target: Any) -> list[InsideStack]:
    """Return the stacks, with the lanes of the latest request."""
    own = handle(target)
    latest = own.implicit.get(current_place())
    lanes = None if latest is None else latest.lane_set
    if lanes is None or not lanes.runs:  # those that the next request takes
        pool = own.setup.lanes
        if not pool.idle():
            pool.give(own.setup.take_lanes(None))
        lanes = pool.idle()[-1]
    return [InsideStack(*pair) for pair in zip(own.setup.stacks, lanes.runs, strict=True)]


def graphs(target: Any) -> Any:
    """Return the graph executor."""
    return handle(target).setup.graphs


def branch(target: Any) -> str | None:
    """Return the guidance branch of the latest call, of the request that code here is part of."""
    return handle(target).current().branch
