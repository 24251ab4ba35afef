"""Graphs on the CPU: tapes in place of CUDA graphs, and a driver that keeps CUDA's rules."""

import pytest
from fake_driver import FakeDriver
from tape import use_driver


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
