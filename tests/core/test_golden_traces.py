"""Step traces worked out by hand from the rules: why each step was full or cached.

The threshold of 1 caches whatever the rules allow, so a trace depends on the rules alone. Then
every pair of options on given diffs, and random options on a real model, against the oracle.
"""

from itertools import combinations

import pytest
import tiny
import torch
from engines import assert_same, options, run_dbcache, run_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Decider, Rule

import dbcache
from dbcache.config.cache import StackSettings
from dbcache.lanes.lane import Lane
from dbcache.results.lane import REASONS

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


REQUESTS = [
    ({}, "WWaaaaaaaaaaaa"),
    ({"num_inference_steps": 5}, "WWaaaWWaaaWWaa"),
    ({"num_inference_steps": 5, "max_continuous_cached_steps": 1}, "WWaRaWWaRaWWaR"),
    ({"num_inference_steps": 5, "max_cached_steps": 2}, "WWaaCWWaaCWWaa"),
    ({"num_inference_steps": 4, "steps_computation_mask": [1, 1, 0, 1]}, "WWaMWWaMWWaMWW"),
    ({"num_inference_steps": 6, "steps_computation_mask": "fast"}, "WWMaaMWWMaaMWW"),
    # calls count, from the beginning of the request; once per request, or each time
    ({"force_refresh_step_hint": 3}, "WWaWWaaaaaaaaa"),
    ({"force_refresh_step_hint": 3, "num_inference_steps": 5}, "WWaWWaaaWWaWWa"),
    (
        {"force_refresh_step_hint": 3, "force_refresh_step_policy": "repeat"},
        "WWaWWaWWaWWaWW",
    ),
    # two calls per step
    ({"enable_separate_cfg": True}, "WWWWaaaaaaaaaa"),
    ({"enable_separate_cfg": True, "num_inference_steps": 3}, "WWWWaaWWWWaaWW"),
    ({"enable_separate_cfg": True, "max_continuous_cached_steps": 1}, "WWWWaaRRaaRRaa"),
    (
        {"enable_separate_cfg": True, "cfg_compute_first": True, "num_inference_steps": 3},
        "WWWWaaWWWWaaWW",
    ),
    ({"enable_separate_cfg": True, "cfg_diff_compute_separate": False}, "WWWWaaaaaaaaaa"),
    ({"enable_separate_cfg": True, "force_refresh_step_hint": 6}, "WWWWaaWWWWaaaa"),
]


@pytest.mark.parametrize(("options", "trace"), REQUESTS, ids=[str(o) for o, _ in REQUESTS])
def test_each_call_of_a_bare_transformer_has_its_reason(options, trace):
    base = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}
    family, letters = tiny.FAMILIES["flux"], []
    model = dbcache.enable(family.build(), **(base | options))
    for call in range(len(trace)):
        tiny.denoise(model, family, 1)
        lanes = dbcache.summary(model).lanes
        # of two branches, the one that ran last has the same steps, or one more than the other
        is_second = len(lanes) == 2 and lanes[0].steps == lanes[1].steps
        letters.append(LETTERS[lanes[is_second].reasons[-1]])
        if options.get("enable_separate_cfg"):
            first_is_uncond = options.get("cfg_compute_first", False)
            assert lanes[0].branch == ("uncond" if first_is_uncond else "cond"), call
    assert "".join(letters) == trace


DIFFS = [
    0.02,
    0.05,
    0.03,
    0.11,
    0.04,
    0.09,
    0.3,
    0.01,
    0.06,
    0.13,
    0.07,
    0.02,
    0.08,
    0.05,
    0.21,
    0.03,
]
OPTIONS = [
    ("residual_diff_threshold", 0.0),
    ("residual_diff_threshold", 0.115),
    ("residual_diff_threshold", 1.0),
    ("max_warmup_steps", 0),
    ("max_warmup_steps", 5),
    ("warmup_interval", 2),
    ("max_cached_steps", 0),
    ("max_cached_steps", 4),
    ("max_continuous_cached_steps", 0),
    ("max_continuous_cached_steps", 1),
    ("max_continuous_cached_steps", 3),
    ("max_accumulated_residual_diff_threshold", 0.075),
    ("steps_computation_mask", (1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0)),
    ("steps_computation_mask", (1,) * 6 + (0,) * 10),
    ("steps_computation_policy", "static"),
    ("l1_hidden_states_diff_threshold", 0.055),
]
PAIRS = [pair for pair in combinations(OPTIONS, 2) if pair[0][0] != pair[1][0]]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_pairs_of_options_decide_as_the_oracle(pair):
    """On a lane of its own, whose changes are given: nothing but the rules is at work."""
    rule = Rule(**{"max_warmup_steps": 2} | dict(pair))
    decider = Decider(rule)
    settings_ = StackSettings(dbcache.DBCacheConfig(**options(rule)), dbcache.CalibratorConfig())
    lane = Lane(settings_, torch.device("cpu"))
    for step, diff in enumerate(DIFFS):
        expected = decider.decide(lambda step=step, diff=diff: diff if step else "no reference")
        code = lane.begin(("any",), torch.device("cpu"))
        partials = torch.tensor([[[diff, 1.0]]]) if lane.steps.has_reference else None
        lane.decide(partials)
        assert lane.settle(code) != expected
        lane.steps.has_reference = True
    assert [REASONS[code] for code in lane.steps.snapshot()()[0]] == decider.trace.reasons


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
