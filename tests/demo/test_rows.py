"""One batch of easy and hard digits: each is drawn as if it were alone."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

from bench.rows import Rows  # noqa: E402
from dbcache.demo.quality import psnr  # noqa: E402

SAMPLES = {(0, 0): 5, (0, 3): 5, (9, 2): 5, (1, 0): 5, (9, 3): 5, (0, 2): 4, (0, 1): 4, (2, 1): 3}
"""Digits with their seeds, and how many of 24 steps each caches: the easy ones first."""

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_sample_of_a_batch_keeps_its_steps_and_its_quality():
    rows = Rows(steps=24, threshold=0.1, order=0)
    samples = list(SAMPLES)
    plain, _, _ = rows.draw(samples, None)
    images, _, cached = rows.draw(samples, "each")
    assert cached == list(SAMPLES.values())
    for index in (0, 5, 7):
        alone, _, steps = rows.draw([samples[index]], "mean")
        assert steps == [cached[index]]
        torch.testing.assert_close(images[index], alone[0], rtol=0, atol=2e-3)
        one = slice(index, index + 1)
        assert psnr(images[one], plain[one]) >= psnr(alone, plain[one]) - 0.1
