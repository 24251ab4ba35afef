"""The benchmark of graphs fails where a variant should run and does not, and keeps to its time."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

from bench import graphs  # noqa: E402


def line(engine, refused):
    return graphs.Line("flux-512", "cached", engine, None, None, refused)


@pytest.mark.parametrize("driver", [None, object()])
def test_what_should_run_and_does_not_is_a_failure(monkeypatch, driver):
    monkeypatch.setattr(graphs, "find_driver", lambda: (driver, "why"))
    rows = [
        line("plain", ""),
        line("dbcache host", "out of memory"),
        line("dbcache device", "no nodes"),
        line("cache-dit", "not installed"),
        line("dbcache eager", ""),
    ]
    host, device = "dbcache host: out of memory", "dbcache device: no nodes"
    expected = [host] if driver is None else [host, device]
    assert graphs.failed(rows) == [f"flux-512, cached, {text}" for text in expected]


@pytest.mark.parametrize(("seconds", "slow"), [(10.0, False), (0.0, True)])
def test_slow_steps_are_timed_less_often(seconds, slow):
    calls = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, turn):
            calls.append(turn)

    variant = SimpleNamespace(latency=[], throughput=[])
    steps = graphs.time_steps(variant, Model(), [{"turn": 0}, {"turn": 1}], 16, seconds)
    assert steps == len(calls)
    assert calls == [i % 2 for i in range(steps)]
    assert len(variant.latency) == (graphs.FEWEST if slow else 16)
    assert len(variant.throughput) == (1 if slow else 2)
    assert steps == (3 + graphs.FEWEST + graphs.ROW // 2 if slow else 3 + 16 + 2 * graphs.ROW)
