"""The benchmark of graphs fails where a variant should run and does not, and keeps to its time."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_driver import FakeDriver
from tape import use_driver

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
    assert graphs.failed(rows, "cuda") == [f"flux-512, cached, {text}" for text in expected]
    assert graphs.failed(rows, "cpu") == []


@pytest.mark.parametrize("engine", ["dbcache eager", "cache-dit"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_wrong_counts_of_cached_steps_are_failures(monkeypatch, engine, device):
    monkeypatch.setattr(graphs, "time_steps", lambda *_: 9)
    variant = graphs.Variant("cached", engine, lambda _: 0, lambda _: 0, lambda _: 7)
    graphs.measure(variant, torch.nn.Identity(), [], 8, 1.0)
    row = graphs.Line("tiny", "cached", engine, None, None, variant.refused, variant.is_wrong)
    assert graphs.failed([row], device) == [
        f"tiny, cached, {engine}: must cache 8 of 9 steps, got 7"
    ]


def test_each_variant_runs_and_caches_what_it_must(monkeypatch, one_thread):
    """With tapes in place of CUDA graphs; a mode that is asked for by name raises, or records."""
    use_driver(monkeypatch, FakeDriver())
    for name in ("ROW", "FEWEST"):
        monkeypatch.setattr(graphs, name, 2)
    engines = ["dbcache", "cache-dit"]
    rows = graphs.run("tiny", graphs.Model(1, 1, 1, 32), "cpu", 4, 0.0, engines)
    ours = [f"dbcache {mode}" for mode in ("eager", "host", "device")]
    kinds = [("full", "plain")]
    kinds += [(kind, name) for kind in ("full", "cached") for name in (*ours, "cache-dit")]
    assert [(row.step, row.engine) for row in rows] == kinds
    assert [row.refused for row in rows] == [""] * len(rows)
    assert all(row.latency_p50 > 0 and row.throughput_p50 > 0 for row in rows)


def test_a_file_is_written_after_each_model(monkeypatch, tmp_path):
    """What ends the program in the second model leaves the first one's times."""
    file = tmp_path / "graphs.json"

    def run(name, *_):
        if name == "flux-512":
            raise KeyboardInterrupt
        return [graphs.Line(name, "full", "plain", 1.0, 2.0, "")]

    monkeypatch.setattr(graphs, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(graphs, "header", lambda device: device)
    models = ["--models", "small-256", "flux-512"]
    monkeypatch.setattr(sys, "argv", ["bench.graphs", *models, "--json", str(file)])
    with pytest.raises(KeyboardInterrupt):
        graphs.main()
    assert [row["model"] for row in json.loads(file.read_text())["rows"]] == ["small-256"]


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
