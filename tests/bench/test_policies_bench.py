"""The comparison of the policies runs each row, calibrated where that is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

from bench import methods, policies  # noqa: E402
from dbcache.config.policies import POLICIES, SCHEDULED  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_there_are_rows_of_every_policy_with_names_of_their_own():
    assert set(policies.THRESHOLDS) == set(POLICIES) - {*SCHEDULED}
    for thresholds in policies.THRESHOLDS.values():
        assert len({f"{x:g}" for x in thresholds}) == len(thresholds)


def test_each_row_says_what_was_cached_and_how_close_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(policies, "THRESHOLDS", {"dbcache": (1.0,), "magcache": (9.0,)})
    monkeypatch.setattr(policies, "CALIBRATED", ("magcache",))
    monkeypatch.setattr(methods, "CALIBRATIONS", tmp_path)
    known = policies.calibrations(6, "cpu", keep=True)
    assert json.loads((tmp_path / "digits_magcache.json").read_text()) == known["magcache"]
    bench = methods.Bench(6, 1, "cpu")
    lines = policies.measure(bench, known, seed=3, predictors=["reuse"])
    assert [line[:3] for line in lines] == [
        ["dbcache 1", "reuse", "2/6"],
        ["magcache 9", "reuse", "2/6"],
    ]
    # four full steps of six, and one block of sixteen on each of the others
    assert [line[3] for line in lines] == ["69%", "67%"]
    assert all(10 < float(line[4]) < 60 for line in lines)
    assert capsys.readouterr().out.count("\n") == 2
    assert "_dbcache" not in vars(bench.pipe)
