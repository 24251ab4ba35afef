"""Plans: what is fixed before the loop starts."""

import pytest
import tiny

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig
from dbcache.lanes.plan import make_plan

LETTERS = {0: "d", 1: "s", 2: "W", 3: "M"}  # dynamic, static, warm-up, mask


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({"max_warmup_steps": 0}, "dddddddd"),
        ({"max_warmup_steps": 3}, "WWWddddd"),
        ({"max_warmup_steps": 6, "warmup_interval": 2}, "WdWdWddd"),
        ({"max_warmup_steps": 6, "steps_computation_mask": [1, 1, 0, 0, 1, 0]}, "WWddMddd"),
        (
            {"steps_computation_mask": [1, 0, 0, 1], "steps_computation_policy": "static"},
            "WssMssss",
        ),
        ({"max_warmup_steps": 1, "steps_computation_mask": [1, 1, 1, 0]}, "WMMddddd"),
        (
            {"max_warmup_steps": 4, "warmup_interval": 3, "steps_computation_mask": [1] * 8},
            "WMMWMMMM",
        ),
    ],
)
def test_plan_follows_warmup_then_mask(options, plan):
    assert "".join(LETTERS[code] for code in make_plan(DBCacheConfig(**options), 8)) == plan


@pytest.mark.parametrize(
    ("options", "steps", "plan"),
    [
        ({"retention_ratio": 0.5}, 8, "WWWWdddd"),
        ({"retention_ratio": 0.2}, 7, "Wddddddd"),  # 1.4 rounds down
        ({"retention_ratio": 0.2}, 8, "WWdddddd"),  # 1.6 up, 2.5 up as well
        ({"retention_ratio": 0.25}, 10, "WWWddddd"),
        ({"retention_ratio": 0.25, "max_warmup_steps": 5}, 8, "WWWWWddd"),
        ({"retention_ratio": 0.4, "max_warmup_steps": 8, "warmup_interval": 4}, 8, "WWWdWddd"),
        ({"retention_ratio": 0.5, "steps_computation_mask": [1, 1, 0, 0]}, 8, "WWdddddd"),
        ({"retention_ratio": 1.0}, 6, "WWWWWWdd"),
    ],
)
def test_a_share_of_the_steps_is_full_whatever_the_interval(options, steps, plan):
    config = DBCacheConfig(**{"max_warmup_steps": 0} | options)
    assert "".join(LETTERS[code] for code in make_plan(config, 8, steps)) == plan


@pytest.mark.parametrize("config", [DBCacheConfig, DBPruneConfig])
def test_the_share_is_that_of_each_request(config):
    pipe = tiny.pipeline("flux")
    settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 1.0}
    dbcache.enable(pipe, config(retention_ratio=0.4, **settings))
    for steps, retained in ((5, 2), (8, 3), (5, 2)):
        tiny.generate(pipe, steps, guided=False)
        (lane,) = dbcache.summary(pipe).lanes
        assert lane.reasons.count("warm-up") == retained
        assert lane.cached_steps == list(range(retained, steps))
