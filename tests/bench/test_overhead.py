"""The benchmark of host time on Triton's path: launches that do nothing, and steps as asked for.

In processes of their own: here Triton interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

from bench import overhead  # noqa: E402
from bench.stubbed_triton import stubbed_triton  # noqa: E402

STUBBED = """
import torch
from bench.stubbed_triton import stubbed_triton
from dbcache.kernels.common.lane_state import CACHED, LaneState
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.prediction.predict import predict

x, ring = torch.ones(1, 8, 64), torch.full((1, 1, 8, 64), 2.0)
state = LaneState.allocate(8, "cpu")
state.weights.zero_()[0] = 1.0
with stubbed_triton() as launches:
    for cached in (True, False):
        launches.cached = cached
        probe_and_decide(x, x, x, state)
        assert state.counters[CACHED] == cached
        predict(x, ring, state.weights)
    assert launches.counts == {"_probe_and_decide_kernel": 2, "_predict_kernel": 2}
assert torch.equal(predict(x, ring, state.weights)[0], x + 2), "the reference again"
assert launches.counts.total() == 4
"""


def python(*words):
    """Run Python without Triton's interpreter; return what it printed."""
    unset = ("TRITON_INTERPRET", "DBCACHE_KERNELS")
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in unset},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_stubbed_launches_are_counted_and_decide_as_asked():
    python("-c", STUBBED)


def test_an_interpreted_process_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET must be unset .* got 1"):
        stubbed_triton().__enter__()


def test_a_run_on_tritons_path_has_all_lines(tmp_path):
    """That each variant caches the steps that it must is checked within."""
    file = tmp_path / "overhead.json"
    options = ["--triton", "--requests", "1", "--json", str(file)]
    said = python("-m", "bench.run", "overhead", *options)
    content = json.loads(file.read_text())
    assert "launches stubbed" in content["header"]
    assert content["add_ms"] > 0
    rows = {(row["step"], row["predictor"], row["engine"]): row for row in content["rows"]}
    kinds = (overhead.WARMUP, overhead.MISS, overhead.CACHED)
    predictors, engines = ("reuse", "TaylorSeer 1"), ("dbcache", "cache-dit")
    expected = {(k, p, e) for k in kinds for p in predictors for e in engines}
    assert rows.keys() == expected | {("plain model", "", ""), ("Fn block only", "", "")}
    for row in content["rows"]:
        assert row["adds"] == pytest.approx(row["overhead_p50"] / content["add_ms"])
        assert row["step"] in said


@pytest.mark.parametrize("cached", [0, 45])
def test_a_variant_that_caches_other_steps_than_it_must_ends_the_run(monkeypatch, cached):
    monkeypatch.setattr(overhead, "STEPS", 8)
    variant = overhead.Variant(
        overhead.CACHED, "reuse", "dbcache", lambda **_: None, cached_steps=lambda: cached
    )
    with pytest.raises(RuntimeError, match=f"dbcache must cache 4 steps .* got {cached}"):
        overhead.measure([variant], 1, "cpu")


def test_lines_are_handed_on_after_each_request(monkeypatch):
    """What ends the run in the third request leaves the lines of two."""
    monkeypatch.setattr(overhead, "STEPS", 8)
    variant = overhead.Variant("plain model", "", "", lambda **_: None)
    noted = []

    def note():
        noted.append(len(variant.times))
        if len(noted) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        overhead.measure([variant], 5, "cpu", note)
    assert noted == [4, 8]
