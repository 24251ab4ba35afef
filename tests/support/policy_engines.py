"""Runs a tiny model under a policy with dbcache and with the oracle, and compares everything."""

import functools

import pytest
from engines import Lane, Run, assert_same, dbcache_lanes, drive, options
from oracle import Rule
from policy_oracle import PolicyOracle
from tiny import BRANCHES, FAMILIES, denoise

import dbcache

LETTERS = {
    "warm-up": "W",
    "mask": "M",
    "no reference": "N",
    "shape changed": "S",
    "threshold is 0": "0",
    "count limit": "C",
    "consecutive limit": "R",
    "accumulated limit": "A",
    "above threshold": "a",
    "below threshold": "b",
}

STEPS = 24
CALIBRATED = ("teacache", "magcache")
BASE = Rule(max_warmup_steps=3, residual_diff_threshold=0.1037, enable_separate_cfg=False)


@functools.cache
def calibration(family_name: str, policy: str, branches: tuple[str, ...] = ("cond",)) -> dict:
    """Return what `calibrate` says of a tiny model."""
    family = FAMILIES[family_name]
    model, guided = family.build(), len(branches) > 1
    with dbcache.calibrate(model, policy=policy, enable_separate_cfg=guided) as content:
        denoise(model, family, STEPS, branches=branches)
    return content


def entry(content: dict) -> dict:
    """Return what a calibration says of its only stack."""
    (only,) = content["stacks"].values()
    return only


def run_both(family, rule, steps=STEPS, content=None, calibrator=None, **how) -> Run:
    """Run with dbcache and with the oracle, compare everything, return dbcache's."""
    if content is None and rule.policy in CALIBRATED:
        branches = BRANCHES if rule.enable_separate_cfg else BRANCHES[:1]
        content = calibration(family.name, rule.policy, branches)
    model, config = family.build(), dbcache.DBCacheConfig(**options(rule), calibration=content)
    dbcache.enable(model, cache_config=config, calibrator_config=calibrator)
    mine = Run(drive(model, family, rule, steps, **how), dbcache_lanes(model))
    known = {} if content is None else entry(content)
    theirs = PolicyOracle(
        family.build(), family, rule, known.get("coefficients"), known.get("ratios")
    )
    with theirs:
        outputs = drive(theirs.model, family, rule, steps, **how)
    traces = theirs.lanes.items()
    lanes = [Lane(t.cached_steps, t.diffs, t.reasons, branch) for branch, t in traces]
    # TeaCache's polynomial cancels digits: its changes are known to fewer than those of the rest
    slack = 2e-4 if rule.policy == "teacache" else 1e-6
    for _, trace in traces:
        assert min(margins(trace, rule), default=1) > slack, "a sum on the threshold: move it"
    if rule.policy == "teacache":
        for lane, expected in zip(mine.lanes, lanes, strict=True):
            for step, diff in expected.diffs.items():
                assert lane.diffs[step] == pytest.approx(diff, abs=slack)
            expected.diffs = {}
    assert_same(mine, Run(outputs, lanes))
    return mine


def margins(trace, rule):
    """Yield how far each compared sum is from the threshold."""
    total = 0.0
    for step, full in enumerate(trace.full):
        total += trace.diffs.get(step, 0.0)
        if step in trace.diffs:
            yield abs(total - rule.residual_diff_threshold)
        total = 0.0 if full else total
