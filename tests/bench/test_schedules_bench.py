"""The published schedules of the trained models: each row runs, and is ahead of a policy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

import dbcache  # noqa: E402
from bench import methods, schedules  # noqa: E402
from bench.subjects import SUBJECTS  # noqa: E402
from dbcache.demo.quality import psnr  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "level", "ahead"), [("digits", "4x", 3), ("moving_digits", "3x", 2)]
)
@torch.no_grad()
def test_a_schedule_is_far_ahead_of_easycache_on_digits_that_were_never_seen(name, level, ahead):
    subject = SUBJECTS[name]
    easy = next(m for m in subject.beside if m.name == "EasyCache, FoCa")
    pipe = subject.bench(subject.steps, 1, "cpu").pipe
    draw = subject.drawing(7, subject.steps)
    plain, drawn, cached = draw(pipe), [], []
    for method in (subject.tuned, easy):
        calibrator = method.calibrator and dbcache.FoCaCalibratorConfig()
        dbcache.enable(pipe, calibrator_config=calibrator, **method.options(level))
        drawn.append(draw(pipe))
        lanes = dbcache.summary(pipe, logging=False).lanes
        cached.append(sum(len(lane.cached_steps) for lane in lanes) / len(lanes))
        dbcache.disable(pipe)
    assert cached[0] == subject.steps - subject.full[level]
    assert cached[1] <= cached[0] + 2
    assert psnr(drawn[0], plain) > psnr(drawn[1], plain) + ahead


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_the_published_front_is_that_of_the_published_records_and_schedule(subject):
    schedule = dbcache.config.schedule.Schedule.of(subject.path)
    for level, full in subject.full.items():
        row = schedule.find(subject.tuned.options(level)["target"])
        assert schedule.rows[row]["full"] == full
    result = json.loads(subject.results.read_text())
    assert methods.table((subject.tuned, *subject.beside), result["records"]) == result["rows"]
    assert schedules.text_of(result) in methods.DOCS.read_text()
    assert f"]({subject.picture.name})" in methods.DOCS.read_text()
    drawn = subject.picture.read_text()
    assert drawn.count("<circle") == len(result["rows"])
    seeds = {record["seed"] for record in result["records"]}
    assert max(seeds) < schedules.CALIBRATED


def test_leads_are_those_over_other_methods_at_as_many_cached_steps():
    rows = [
        {"method": name, "engine": "dbcache", "level": level, "cached": cached, "psnr": psnr}
        for name, level, cached, psnr in (
            ("tuned schedule", "2x", 25, 70.0),
            ("tuned schedule", "4x", 38, 60.0),
            ("EasyCache", "2x", 20, 72.0),
            ("EasyCache", "3x", 30, 64.0),
            ("FoCa", "3x", 36, 50.0),
            ("FoCa", "4x", 40, 46.0),
        )
    ]
    assert schedules.leads(rows).splitlines() == [
        "2x: 70.0 dB at 25 cached, +2.0 dB to EasyCache (dbcache), 68.0 dB there",
        "4x: 60.0 dB at 38 cached, +12.0 dB to FoCa (dbcache), 48.0 dB there",
    ]
