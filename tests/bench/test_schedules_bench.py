"""The published schedule of the trained model: each row runs, and is ahead of a policy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

import dbcache  # noqa: E402
from bench import schedules  # noqa: E402
from dbcache.cli.drawn import digits_drawing  # noqa: E402
from dbcache.demo import digits  # noqa: E402
from dbcache.demo.quality import psnr  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_row_for_4x_is_far_ahead_of_easycache_on_digits_that_were_never_seen():
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw(**options):
        if options:
            dbcache.enable(pipe, **options)
        generator = torch.Generator().manual_seed(7)
        call = {"num_inference_steps": schedules.STEPS, "generator": generator}
        picture = digits.decode(pipe(**digits.prompt([4]), **call).images)
        cached = 0
        if options:
            cached = len(dbcache.summary(pipe, logging=False).lanes[0].cached_steps)
            dbcache.disable(pipe)
        return picture, cached

    plain, _ = draw()
    tuned, cached = draw(**schedules.TUNED.options("4x"))
    assert cached == schedules.STEPS - schedules.FULL_STEPS["4x"]
    easy, as_many = draw(
        policy="easycache", residual_diff_threshold=0.06, max_warmup_steps=4, enable_foca=True
    )
    assert as_many <= cached + 2
    assert psnr(tuned, plain) > psnr(easy, plain) + 3


def test_the_rows_of_all_levels_are_in_the_file_and_seeds_are_apart():
    found = dbcache.config.schedule.Schedule.of(schedules.PATH)
    for level, full in schedules.FULL_STEPS.items():
        row = found.find(schedules.TUNED.options(level)["target"])
        assert found.rows[row]["full"] == full
    assert {m.name for m in schedules.methods.METHODS} >= set(schedules.BESIDE)
    assert schedules.CALIBRATED > 20
    first = digits_drawing(schedules.CALIBRATED, 2)
    pipe = digits.load_pipeline()
    assert first(pipe).shape == (5, 16, 16)


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
