"""Plans: what is fixed before the loop starts."""

import pytest
import tiny

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig
from dbcache.config.cache import merge
from dbcache.kernels.common.lane_state import PlanCode
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


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(None, 8), (1, 0), (2, 1), (4, 2), (7, 3), (8, 4), (12, 6), (15, 7), (16, 8), (50, 8)],
)
def test_the_warmup_that_was_not_given_is_half_of_few_steps(steps, warmup):
    config = DBCacheConfig(Fn_compute_blocks=1)
    assert config.max_warmup_steps == 8
    for form in (config, merge(config, DBCacheConfig(warmup_interval=1)), DBPruneConfig()):
        plan = make_plan(form, 20, steps)
        assert "".join(LETTERS[code] for code in plan) == "W" * warmup + "d" * (20 - warmup)
    for form in (
        DBCacheConfig(max_warmup_steps=8),
        merge(config, DBCacheConfig(max_warmup_steps=8)),
        merge(DBCacheConfig(max_warmup_steps=8), DBCacheConfig(warmup_interval=1)),
        DBCacheConfig().update(max_warmup_steps=8),
    ):
        assert make_plan(form, 20, steps).count(PlanCode.WARMUP) == 8


@pytest.mark.parametrize("config", [DBCacheConfig, DBPruneConfig])
def test_the_warmup_follows_the_steps_of_each_request(config):
    pipe = tiny.pipeline("flux")
    settings = {"Fn_compute_blocks": 1, "residual_diff_threshold": 1.0}
    dbcache.enable(pipe, config(**settings))
    for steps in (4, 8, 4, 18):
        tiny.generate(pipe, steps, guided=False)
        (lane,) = dbcache.summary(pipe).lanes
        assert lane.cached_steps == list(range(min(8, steps // 2), steps))
    dbcache.enable(pipe, config(max_warmup_steps=8, **settings))
    tiny.generate(pipe, 4, guided=False)
    assert dbcache.summary(pipe).lanes[0].cached_steps == []


def test_a_transformer_alone_takes_the_steps_that_it_was_told():
    family = tiny.FAMILIES["wan"]
    model = dbcache.enable(
        family.build(),
        Fn_compute_blocks=1,
        residual_diff_threshold=1.0,
        enable_separate_cfg=False,
        num_inference_steps=6,
    )
    tiny.denoise(model, family, 6)
    assert dbcache.summary(model).lanes[0].cached_steps == [3, 4, 5]
    dbcache.refresh_context(model, num_inference_steps=10)
    tiny.denoise(model, family, 10)
    assert dbcache.summary(model).lanes[0].cached_steps == [5, 6, 7, 8, 9]
    for steps in (10, 12):  # what reads as before is given now
        dbcache.refresh_context(model, num_inference_steps=steps, max_warmup_steps=8)
        tiny.denoise(model, family, steps)
        assert dbcache.summary(model).lanes[0].cached_steps == list(range(8, steps))


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
