"""Graphs on the CPU: tapes in place of CUDA graphs, and a driver that keeps CUDA's rules."""

from collections import defaultdict

import pytest
from fake_driver import FakeDriver
from tape import TapeCapture, use_driver

from dbcache.adapters.requests import clock


@pytest.fixture(scope="module")
def known():
    """Return dicts for `graph_runs.both`: eager runs that the tests of several modes share."""
    return defaultdict(dict)


@pytest.fixture
def driver(monkeypatch):
    """Return the fake driver of a recent machine; recordings on the CPU go through it."""
    fake = FakeDriver()
    use_driver(monkeypatch, fake)
    return fake


@pytest.fixture
def without_driver(monkeypatch):
    """Record on the CPU as on a machine that has no conditional nodes."""
    use_driver(monkeypatch, None)


@pytest.fixture
def capture(monkeypatch):
    """Return a function that captures what another function does."""

    def run(fake, function):
        use_driver(monkeypatch, fake)
        monkeypatch.setattr(clock, "is_capturing", lambda: True)
        try:
            with TapeCapture(fake) as graph:
                function()
        finally:
            monkeypatch.setattr(clock, "is_capturing", lambda: False)
        return graph

    return run
