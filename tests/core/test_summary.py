"""Summaries: percentiles, reasons, warnings, and the forms they are shown in."""

import json
import math
from dataclasses import replace

import numpy as np

from dbcache.kernels.common.lane_state import Reason
from dbcache.results.lane import REASONS, LaneSummary
from dbcache.results.summary import Summary


def lane(reasons, diffs, threshold=0.1):
    attributes = {
        "transformer": "T",
        "stack": "blocks",
        "branch": "cond",
        "threshold": threshold,
        "megabytes": 1.0,
    }
    return LaneSummary.from_trace([int(r) for r in reasons], diffs, **attributes)


def test_every_reason_has_a_text_of_its_own():
    assert set(REASONS) == set(Reason)
    assert len(set(REASONS.values())) == len(Reason)


def test_reports_steps_reasons_and_percentiles():
    diffs = [-1.0, 0.03, 0.2, 0.05, 0.09]
    reasons = [
        Reason.WARMUP,
        Reason.BELOW_THRESHOLD,
        Reason.ABOVE_THRESHOLD,
        Reason.BELOW_THRESHOLD,
        Reason.CONSECUTIVE_LIMIT,
    ]
    summary = lane(reasons, diffs)
    assert (summary.steps, summary.cached_steps) == (5, [1, 3])
    assert summary.diffs == {1: 0.03, 2: 0.2, 3: 0.05, 4: 0.09}
    assert summary.counts["below threshold"] == 2
    expected = np.percentile(diffs[1:], [0, 25, 50, 75, 95, 100])
    np.testing.assert_allclose(list(summary.percentiles.values()), expected)
    assert summary.warnings == []


def test_warns_of_a_cache_that_never_hits():
    text = lane([Reason.WARMUP, Reason.ABOVE_THRESHOLD], [-1, 0.31]).warnings[0]
    assert "never hit" in text
    assert "0.31" in text
    assert "warm-up" in lane([Reason.WARMUP] * 4, [-1] * 4).warnings[0]


def test_warns_of_a_threshold_that_never_decides():
    reasons = [Reason.WARMUP, Reason.BELOW_THRESHOLD, Reason.CONSECUTIVE_LIMIT]
    assert "never decided" in lane(reasons, [-1, 0.01, 0.02]).warnings[0]


def test_counts_nan_diffs_and_keeps_them_out_of_the_percentiles():
    summary = lane([Reason.WARMUP, Reason.NAN, Reason.BELOW_THRESHOLD], [-1, math.nan, 0.05])
    assert "1 diffs are NaN" in summary.warnings[0]
    assert summary.percentiles["max"] == 0.05
    assert math.isnan(summary.diffs[1])
    assert "try another Fn_compute_blocks" in summary.warnings[0]
    other = replace(summary, policy="easycache")
    assert "what policy='easycache' compares" in other.warnings[0]
    assert "try another policy" in other.warnings[0]


def test_shows_text_markdown_and_plain_data():
    summary = Summary([lane([Reason.WARMUP, Reason.ABOVE_THRESHOLD], [-1, 0.31])], ["a note"])
    text, markdown = str(summary), summary.to_markdown()
    assert "above threshold 1" in text
    assert "warning: a note" in text
    assert markdown.splitlines()[1].startswith("|---")
    assert "- a note" in markdown
    data = json.loads(json.dumps(summary.to_dict()))
    assert data["lanes"][0]["reasons"] == ["warm-up", "above threshold"]
    assert data["cached_fraction"] == 0
    assert "no step" in str(Summary())
