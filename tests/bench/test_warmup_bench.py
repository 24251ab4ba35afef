"""The comparison of warm-ups runs, and its table says what was cached."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

from bench import warmup  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_longer_warmup_caches_less_and_is_closer(monkeypatch):
    monkeypatch.setattr(warmup, "RULES", {"all": warmup.RULES["F1B0 R1 MC1"]})
    records = warmup.measure(4, 1, 1, "cpu")
    assert [(row["warmup"], row["cached"]) for row in records] == [(1, 2), (2, 1), (3, 1), (8, 0)]
    assert records[0]["psnr"] < records[1]["psnr"] < records[3]["psnr"] == float("inf")
    header, _, *lines = warmup.markdown(records).splitlines()
    assert header == "| steps | warm-up | all | CPU time | PSNR dB |"
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| 4", "1", "2"], ["| 4", "2", "1"], ["| 4", "3", "1"], ["| 4", "8", "0"]
    ]  # fmt: skip
