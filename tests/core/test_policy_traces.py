"""Traces of the policies without a probe, worked out by hand, and what MagCache knows ahead."""

import json

import inside
import pytest
from policy_engines import LETTERS, STEPS, calibration, entry
from tiny import FAMILIES, denoise, generate, pipeline

import dbcache
from dbcache.lanes.step_state import StepState

pytestmark = pytest.mark.usefixtures("one_thread")

RATIOS = [1.0, 1.1, 1.1, 1.2, 1.0, 0.9, 0.9, 1.0, 1.0, 1.5]
"""After a full step 0 the sums are .1, .31, .762; after 2: .2, .4; after 4: .1, .29, .48; after 7:
0, .5."""


HIGH = {"residual_diff_threshold": 1e9}
"""Caches whatever the rules allow."""


@pytest.mark.parametrize(
    ("policy", "settings", "trace"),
    [
        ("easycache", {"max_warmup_steps": 0}, "NNbbbbbbbb"),  # a rate needs two full steps
        ("easycache", {"max_warmup_steps": 1}, "WNbbbbbbbb"),
        ("easycache", {"max_warmup_steps": 3}, "WWWbbbbbbb"),
        ("easycache", {"max_warmup_steps": 5, "warmup_interval": 2}, "WNWbWbbbbb"),
        ("easycache", {"max_continuous_cached_steps": 2}, "WWbbRbbRbb"),
        ("easycache", {"max_cached_steps": 3}, "WWbbbCCCCC"),
        ("easycache", {"steps_computation_mask": [1, 0, 0, 1, 0, 0, 1, 0, 0, 0]}, "WNbMbbMbbb"),
        ("easycache", {"max_accumulated_residual_diff_threshold": 1e-9}, "WWbAbAbAbA"),
        ("easycache", {"residual_diff_threshold": 0.0}, "WW00000000"),
        ("seacache", {"max_warmup_steps": 0}, "Nbbbbbbbbb"),
        ("seacache", {"max_warmup_steps": 5, "warmup_interval": 2}, "WbWbWbbbbb"),
        ("seacache", {"max_continuous_cached_steps": 2, "max_cached_steps": 5}, "WWbbRbbRbC"),
        ("seacache", {"retention_ratio": 0.35}, "WWWWbbbbbb"),
        ("teacache", {"max_warmup_steps": 0}, "Nbbbbbbbbb"),
        ("teacache", {"steps_computation_mask": [1, 1, 0, 1, 0, 0, 1, 0, 0, 1]}, "WWbMbbMbbM"),
    ],
)
def test_traces_of_the_rules_alone_worked_out_by_hand(policy, settings, trace):
    pipe = dbcache.enable(
        pipeline("flux"), policy=policy, **{"max_warmup_steps": 2} | HIGH | settings
    )
    generate(pipe, 10, guided=False)
    (lane,) = dbcache.summary(pipe).lanes
    assert "".join(LETTERS[reason] for reason in lane.reasons) == trace


def known(ratios) -> dict:
    """Return a calibration of a tiny FLUX with these ratios."""
    content = json.loads(json.dumps(calibration("flux", "magcache")))
    entry(content)["ratios"] = {"": ratios}
    return content


@pytest.mark.parametrize(
    ("settings", "trace"),
    [
        ({"residual_diff_threshold": 0.3}, "Nbababbaba"),
        ({"residual_diff_threshold": 0.35}, "Nbbabbbaba"),
        ({"residual_diff_threshold": 9.0}, "Nbbbbbbbbb"),
        ({"residual_diff_threshold": 0.0}, "N000000000"),
        ({"residual_diff_threshold": 9.0, "max_continuous_cached_steps": 2}, "NbbRbbRbbR"),
        ({"residual_diff_threshold": 9.0, "max_cached_steps": 3}, "NbbbCCCCCC"),
        ({"residual_diff_threshold": 0.3, "max_warmup_steps": 2}, "WWbabbbaba"),
        ({"residual_diff_threshold": 9.0, "retention_ratio": 0.25}, "WWWbbbbbbb"),
        (
            {
                "residual_diff_threshold": 9.0,
                "steps_computation_mask": [1, 0, 0, 1, 0, 0, 1, 0, 0, 0],
            },
            "MbbMbbMbbb",
        ),
    ],
)
def test_magcache_traces_worked_out_by_hand(settings, trace):
    pipe = pipeline("flux")
    base = {"policy": "magcache", "max_warmup_steps": 0, "calibration": known(RATIOS)}
    dbcache.enable(pipe, **(base | settings))
    generate(pipe, 10, guided=False)
    (lane,) = dbcache.summary(pipe).lanes
    assert "".join(LETTERS[reason] for reason in lane.reasons) == trace


def test_magcache_never_waits_for_the_device(monkeypatch):
    def read(_):
        raise AssertionError("the host read a decision")

    monkeypatch.setattr(StepState, "read_flag", read)
    family = FAMILIES["flux"]
    model = dbcache.enable(family.build(), policy="magcache", calibration=known(RATIOS))
    denoise(model, family, STEPS)
    assert dbcache.summary(model).lanes[0].cached_steps


def test_magcache_takes_the_nearest_ratio_for_another_number_of_steps():
    ratios = [1.0, 1.01, 1.02, 1.03, 1.04]
    for steps, expected in {
        5: ratios,
        3: [1.0, 1.02, 1.04],
        9: [1.0, 1.0, 1.01, 1.02, 1.02, 1.02, 1.03, 1.04, 1.04],
        1: [1.04],
        None: ratios,
    }.items():
        settings = {"policy": "magcache", "calibration": known(ratios), "max_warmup_steps": 0}
        config = dbcache.DBCacheConfig(**settings)
        model = dbcache.enable(FAMILIES["flux"].build(), cache_config=config)
        (stack,) = inside.stacks(model)
        assert list(stack.settings.calibration.ratios_for(None, steps)) == expected
        assert list(stack.settings.calibration.ratios_for("uncond", steps)) == expected


def test_magcache_fits_each_request_of_a_pipeline():
    pipe = pipeline("flux")
    settings = {"policy": "magcache", "max_warmup_steps": 1, "residual_diff_threshold": 0.05}
    dbcache.enable(pipe, calibration=known([1.0, 1.0, 1.5]), **settings)
    traces = []
    for steps in (3, 6, 3):
        generate(pipe, steps, guided=False)
        (lane,) = dbcache.summary(pipe).lanes
        traces.append("".join(LETTERS[reason] for reason in lane.reasons))
    assert traces == ["Wba", "Wbbbaa", "Wba"]


# --- which models ---
