"""Step traces worked out by hand from the rules: why each step was full or cached.

The threshold of 1 caches whatever the rules allow, so a trace depends on the rules alone. Then
random options against the oracle, where the diffs decide as well.
"""

import pytest
import tiny
from engines import assert_same, run_dbcache, run_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Rule

import dbcache

STEPS = 14
LETTERS = {
    "warm-up": "W",
    "mask": "M",
    "count limit": "C",
    "consecutive limit": "R",
    "accumulated limit": "A",
    "no reference": "N",
    "threshold is 0": "0",
    "static": "s",
    "threshold is 1 or more": "a",
}
"""Capitals are full steps, small letters cached ones."""

MASK = [1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1]
STATIC = {"steps_computation_mask": MASK, "steps_computation_policy": "static"}

GOLDEN = [
    ({"max_warmup_steps": 0}, "Naaaaaaaaaaaaa"),
    ({"max_warmup_steps": 4}, "WWWWaaaaaaaaaa"),
    ({"max_warmup_steps": 20}, "WWWWWWWWWWWWWW"),
    ({"max_warmup_steps": 4, "residual_diff_threshold": 0.0}, "WWWW0000000000"),
    ({"max_warmup_steps": 6, "warmup_interval": 2}, "WaWaWaaaaaaaaa"),
    ({"max_warmup_steps": 8, "warmup_interval": 3}, "WaaWaaWaaaaaaa"),
    ({"max_cached_steps": 0}, "WWCCCCCCCCCCCC"),
    ({"max_cached_steps": 3}, "WWaaaCCCCCCCCC"),
    ({"max_continuous_cached_steps": 0}, "WWRRRRRRRRRRRR"),
    ({"max_continuous_cached_steps": 1}, "WWaRaRaRaRaRaR"),
    ({"max_continuous_cached_steps": 3}, "WWaaaRaaaRaaaR"),
    ({"steps_computation_mask": MASK}, "WWaaMaaaMaaaaM"),
    (STATIC, "WWssMsssMssssM"),
    ({"max_accumulated_residual_diff_threshold": 1e-9}, "WWaAaAaAaAaAaA"),
    # pairs
    ({"max_accumulated_residual_diff_threshold": 1e-9, "max_cached_steps": 3}, "WWaAaAaCCCCCCC"),
    ({"max_accumulated_residual_diff_threshold": 1e-9} | STATIC, "WWssMsssMssssM"),
    ({"max_warmup_steps": 5, "warmup_interval": 2, "max_cached_steps": 3}, "WaWaWaCCCCCCCC"),
    (
        {"max_warmup_steps": 7, "warmup_interval": 3, "max_continuous_cached_steps": 1},
        "WaRWaRWaRaRaRa",
    ),
    ({"max_cached_steps": 5, "max_continuous_cached_steps": 2}, "WWaaRaaRaCCCCC"),
    ({"max_cached_steps": 4, "max_continuous_cached_steps": 4}, "WWaaaaCCCCCCCC"),
    ({"steps_computation_mask": MASK, "max_warmup_steps": 1}, "WMaaMaaaMaaaaM"),
    ({"steps_computation_mask": MASK, "max_warmup_steps": 9}, "WWaaMaaaMaaaaM"),
    ({"steps_computation_mask": MASK, "warmup_interval": 2}, "WMaaMaaaMaaaaM"),
    ({"steps_computation_mask": MASK, "max_cached_steps": 4}, "WWaaMaaCMCCCCM"),
    ({"steps_computation_mask": MASK, "max_continuous_cached_steps": 2}, "WWaaMaaRMaaRaM"),
    ({"steps_computation_mask": MASK, "residual_diff_threshold": 0.0}, "WW00M000M0000M"),
    ({"steps_computation_mask": "ultra"}, "WWaMaaMaaaMaaM"),
    (STATIC | {"max_cached_steps": 1, "max_continuous_cached_steps": 1}, "WWssMsssMssssM"),
    (STATIC | {"residual_diff_threshold": 0.0}, "WWssMsssMssssM"),
    ({"force_refresh_step_hint": 5}, "WWaaaaaaa"),
    ({"force_refresh_step_hint": 5, "force_refresh_step_policy": "repeat"}, "WWaa"),
    (
        {"force_refresh_step_hint": 6, "max_continuous_cached_steps": 2},
        "WWaaRaaR",
    ),
]


@pytest.mark.parametrize(("options", "trace"), GOLDEN, ids=[str(options) for options, _ in GOLDEN])
def test_each_step_has_its_reason(options, trace):
    base = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}
    pipe = dbcache.enable(tiny.pipeline("flux"), **(base | options))
    tiny.generate(pipe, STEPS, guided=False)
    (lane,) = dbcache.summary(pipe).lanes
    assert "".join(LETTERS[reason] for reason in lane.reasons) == trace


def limits(high):
    """Return a strategy for a limit: none, or 0 to `high`."""
    return st.integers(-1, high)


masks = st.none() | st.lists(st.integers(0, 1), min_size=12, max_size=12).map(lambda m: (1, *m[1:]))
rules = st.builds(
    Rule,
    Fn_compute_blocks=st.integers(1, 3),
    Bn_compute_blocks=st.integers(0, 3),
    # odd digits, so that no diff lies on it
    residual_diff_threshold=st.sampled_from([0.0, 0.0613, 0.1237, 0.2511, 1.0]),
    max_warmup_steps=st.integers(0, 6),
    warmup_interval=st.integers(1, 3),
    max_cached_steps=limits(6),
    max_continuous_cached_steps=limits(3),
    max_accumulated_residual_diff_threshold=st.sampled_from([None, 0.0917, 0.3019]),
    steps_computation_mask=masks,
    steps_computation_policy=st.sampled_from(["dynamic", "static"]),
    order=st.integers(0, 2),
)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(rule=rules)
def test_random_options_decide_and_predict_as_the_oracle(rule):
    family = tiny.FAMILIES["flux"]
    expected = run_oracle(family.build(), family, rule, 12)
    assert_same(run_dbcache(family.build(), family, rule, 12), expected)
