"""The comparison of the policies runs each row, calibrated where that is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

import dbcache  # noqa: E402
from bench import policies  # noqa: E402
from dbcache.demo import digits  # noqa: E402
from dbcache.policies import POLICIES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_there_are_rows_of_every_policy_with_names_of_their_own():
    assert {row.policy for row in policies.ROWS} == set(POLICIES)
    assert len({row.name for row in policies.ROWS}) == len(policies.ROWS)


def test_each_row_says_what_was_cached_and_how_close_it_is(monkeypatch, capsys):
    rows = (policies.Row("dbcache", 1.0), policies.Row("magcache", 9.0))
    monkeypatch.setattr(policies, "ROWS", rows)
    monkeypatch.setattr(policies, "CALIBRATED", ("magcache",))
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    lines = policies.measure(pipe, steps=6, per_digit=1, seed=3, predictors=["reuse"])
    assert [line[:3] for line in lines] == [
        ["dbcache 1", "reuse", "2/6"],
        ["magcache 9", "reuse", "2/6"],
    ]
    # four full steps of six, and one block of sixteen on each of the others
    assert [line[3] for line in lines] == ["69%", "67%"]
    assert all(10 < float(line[4]) < 60 for line in lines)
    assert capsys.readouterr().out.count("\n") == 2
    assert "_dbcache" not in vars(pipe)


def test_levels_of_speed_are_settings_that_the_digits_model_takes():
    pipe = digits.load_pipeline()
    assert set(policies.LEVELS) == set(POLICIES) - {"dbcache"}
    for policy, levels in policies.LEVELS.items():
        thresholds = []
        for options in levels.values():
            dbcache.enable(pipe, **options)
            (stack,) = pipe.transformer.__dict__["_dbcache"].stacks
            assert stack.settings.cache.policy == policy
            thresholds.append(stack.settings.cache.threshold)
            dbcache.disable(pipe)
        assert thresholds == sorted(thresholds)
