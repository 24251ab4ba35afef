"""Who enabled a transformer, and with what: pipelines that share it, and calls without any."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from dbcache.adapters.requests.setup import Setup

MAX_REQUESTS = 64
"""Requests that may be open at once, unless `enable` was told otherwise."""


class Enabled(NamedTuple):
    """By whom a transformer is enabled, and with what; replaced as a whole.

    Attributes:
        alone: the setup for calls outside of a pipeline's calls; None: they run without the cache.
        owners: pipelines whose calls are requests, each with its setup.
        latest: the setup of the last `enable`; None while the cache is off.
        max_requests: how many may be open at once.
    """

    alone: Setup | None = None
    owners: tuple[tuple[weakref.ref[Any], Setup], ...] = ()
    latest: Setup | None = None
    max_requests: int = MAX_REQUESTS

    @property
    def setups(self) -> list[Setup]:
        """Those of the owners, and that for calls outside of theirs."""
        own = [setup for _, setup in self.owners]
        return own if self.alone is None else [*own, self.alone]

    def with_owner(self, pipeline: Any, setup: Setup, max_requests: int) -> Enabled:
        """Return this with a pipeline, in place of what the pipeline was before."""
        others = self.without_owner(pipeline.pipe).owners
        owners = (*others, (weakref.ref(pipeline), setup))
        return self._replace(owners=owners, latest=setup, max_requests=max_requests)

    def without_owner(self, pipe: Any) -> Enabled:
        """Return this without a pipeline, and without those that are gone."""
        kept = tuple(
            (owner, setup)
            for owner, setup in self.owners
            if (own := owner()) is not None and own.pipe is not pipe
        )
        rest = self._replace(owners=kept)
        latest = self.latest if any(self.latest is setup for setup in rest.setups) else None
        return rest._replace(latest=latest or next(reversed(rest.setups), None))
