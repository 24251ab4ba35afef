"""What a summary shows of a transformer beside the lanes: the last request, bytes, notes."""

from __future__ import annotations

from collections.abc import Iterable

from dbcache.adapters.requests.cached_transformer import CachedTransformer, handle_of
from dbcache.adapters.requests.context import current_place
from dbcache.adapters.requests.notices import texts_on_options
from dbcache.adapters.requests.record import RequestRecord


def shown(handle: CachedTransformer) -> RequestRecord | None:
    """Return the record that a summary shows, None where no step was run."""
    place = handle.implicit.get(current_place())
    if place is not None and place.has_run:
        return place.shown()
    if handle.closed is not None:
        return handle.closed
    return next((one.shown() for one in handle.under_way() if one.has_run), None)


def nbytes(handle: CachedTransformer) -> int:
    """Bytes of all buffers: of open requests, and those kept for the next ones."""
    pools = {id(setup.lanes): setup.lanes for setup in handle.setups}
    held = [request.lane_set.nbytes() for request in handle.under_way()]
    return sum(held) + sum(pool.nbytes() for pool in pools.values())


def notes(handle: CachedTransformer) -> list[str]:
    """Return what the summary should say beside the lanes."""
    latest = handle.enabled.latest
    graphs = None if latest is None else latest.graphs
    notes = [] if graphs is None else graphs.describe()
    if handle.is_lost:
        notes.append(
            "someone has replaced its forward since, and calls run without the cache; call "
            "dbcache.enable again"
        )
    if handle.uncached_calls:
        notes.append(
            f"{handle.uncached_calls} calls came from outside of the pipeline that the cache is "
            f"enabled on and ran without it; enable the pipeline that calls it, or the transformer"
        )
    tally, living = handle.tally, sum(one.notices.has_begun for one in handle.under_way())
    lost = tally.begun - tally.ended - living
    if lost > 0:
        notes.append(
            f"{lost} requests ended unseen, with their thread or dropped without "
            f"close(), and are missing here; call summary in the thread, or close them"
        )
    notes += [] if latest is None else texts_on_options(latest)
    return [f"{type(handle.module).__name__}: {note}" for note in notes]


def has_run(handle: CachedTransformer) -> bool:
    """Whether calls were made of which there may be nothing to show."""
    return bool(handle.uncached_calls or handle.tally.begun or handle.closed)


def end_images(parts: Iterable[object]) -> None:
    """Say what there is to say of the requests of this thread or task that nobody ends."""
    for handle in map(handle_of, parts):
        if isinstance(handle, CachedTransformer):
            request = handle.implicit.get(current_place())
            if request is not None and request.has_run:
                request.notices.end_image(request)
