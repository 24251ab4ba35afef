"""Short names, ranges of blocks, and what was written for cache-dit 0.2."""

import logging

import pytest
import tiny
import torch

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig, TaylorSeerCalibratorConfig
from dbcache.cache_factory import CacheType, apply_cache_on_pipe, block_range

STEPS = 12


def latents(pipe):
    return tiny.generate(pipe, STEPS, guided=False)


def test_ranges_hold_the_first_and_the_last_block():
    assert block_range(0, 16, 2) == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert block_range(4, 10, 3) == [0, 4, 7, 9]
    assert CacheType.range(0, 7, 3) == [0, 3, 6]
    for nothing in ((5, 4, 2), (0, 0, 2), (0, 8, 1), (0, 8)):
        assert block_range(*nothing) == []
    with pytest.raises(ValueError, match="start"):
        block_range(-1, 4, 2)


def test_types_have_names():
    assert dbcache.cache_type("DBPrune") is CacheType.DBPrune
    assert DBCacheConfig(cache_type=CacheType.DBCache) == DBCacheConfig()


@pytest.mark.parametrize(
    ("kind", "changes", "expected", "calibrator"),
    [
        (
            CacheType.DBCache,
            {"warmup_steps": 3, "Fn_compute_blocks": 2, "Bn_compute_blocks": 4}
            | {"Bn_compute_blocks_ids": CacheType.range(0, 4, 2)},
            DBCacheConfig(
                Fn_compute_blocks=2,
                Bn_compute_blocks=4,
                Bn_compute_blocks_ids=[0, 2, 3],
                max_warmup_steps=3,
                residual_diff_threshold=0.12,
            ),
            None,
        ),
        (
            CacheType.FBCache,
            {"warmup_steps": 3, "enable_taylorseer": True, "enable_encoder_taylorseer": True}
            | {"residual_diff_threshold": 0.12}
            | {"taylorseer_cache_type": "residual", "taylorseer_kwargs": {"n_derivatives": 2}},
            DBCacheConfig(
                Fn_compute_blocks=1,
                max_warmup_steps=3,
                max_cached_steps=8,
                residual_diff_threshold=0.12,
            ),
            TaylorSeerCalibratorConfig(taylorseer_order=2),
        ),
        (
            CacheType.DBPrune,
            {"Fn_compute_blocks": 1, "Bn_compute_blocks": 1, "warmup_steps": 2}
            | {"max_pruned_steps": 6, "non_prune_blocks_ids": [4], "residual_diff_threshold": 0.1},
            DBPruneConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=1,
                max_warmup_steps=2,
                max_pruned_steps=6,
                non_prune_block_ids=[4],
                residual_diff_threshold=0.1,
            ),
            None,
        ),
    ],
    ids=["DBCache", "FBCache", "DBPrune"],
)
def test_options_of_version_0_2_do_what_the_configs_do(kind, changes, expected, calibrator):
    old = apply_cache_on_pipe(tiny.pipeline("flux"), **CacheType.default_options(kind) | changes)
    new = dbcache.enable(tiny.pipeline("flux"), expected, calibrator)
    assert all(map(torch.equal, latents(old), latents(new)))
    assert dbcache.strify(old) == dbcache.strify(new)
    assert any(lane.cached_steps for lane in dbcache.summary(old).lanes)


def test_what_version_0_2_did_when_nothing_was_said():
    first_block = CacheType.default_options(CacheType.FBCache)
    assert (first_block["residual_diff_threshold"], first_block["max_cached_steps"]) == (0.08, 8)
    assert CacheType.default_options(CacheType.DBCache)["residual_diff_threshold"] == 0.12
    for kwargs, name in (({}, "T1O2"), ({"taylorseer_kwargs": {}}, "T1O2"), (
        {"taylorseer_kwargs": {"n_derivatives": 3}}, "T1O3"
    )):  # fmt: skip
        pipe = apply_cache_on_pipe(tiny.pipeline("flux"), enable_taylorseer=True, **kwargs)
        assert dbcache.strify(pipe).endswith(f"_{name}")
    pipe = apply_cache_on_pipe(
        tiny.pipeline("flux"), warmup_steps=-1, do_separate_classifier_free_guidance=True
    )
    assert "_W0I1M0MC0_R0.12_CFG1" in dbcache.strify(pipe)
    for kind in (CacheType.DBCache, CacheType.FBCache, CacheType.DBPrune):
        options = CacheType.default_options(kind) | {"max_warmup_steps": 2}  # its new name
        assert "_W2I1" in dbcache.strify(apply_cache_on_pipe(tiny.pipeline("flux"), **options))
        pipe = apply_cache_on_pipe(tiny.pipeline("flux"), cache_type=kind)
        assert "_F1B0_W0I1M0MC0_R0.05" in dbcache.strify(pipe)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_derivative": 2}, "did you mean 'n_derivatives'"),
        (2, r"taylorseer_kwargs must be a mapping or None, got 2"),
    ],
)
def test_taylorseer_kwargs_are_checked(kwargs, match):
    pipe = tiny.pipeline("flux")
    with pytest.raises(TypeError, match=match):
        apply_cache_on_pipe(pipe, enable_taylorseer=True, taylorseer_kwargs=kwargs)
    assert "_dbcache" not in pipe.__dict__


def test_the_method_may_be_named_in_flat_options_and_in_files():
    options = {"cache_type": "DBPrune", "Fn_compute_blocks": 1, "non_prune_block_ids": [3]}
    options |= {"max_warmup_steps": 2, "residual_diff_threshold": 0.1}
    loaded = dbcache.load_configs({"cache_config": options})["cache_config"]
    assert loaded == DBPruneConfig(**options)
    expected = latents(dbcache.enable(tiny.pipeline("flux"), loaded))
    for config in (None, DBCacheConfig(max_warmup_steps=2)):
        pipe = dbcache.enable(tiny.pipeline("flux"), config, **options)
        assert all(map(torch.equal, latents(pipe), expected))
    pipe = dbcache.enable(tiny.pipeline("flux"), DBPruneConfig(**options | {"max_warmup_steps": 5}))
    pipe = dbcache.enable(pipe, loaded, max_cached_steps=1)
    latents(pipe)
    assert len(dbcache.summary(pipe).lanes[0].cached_steps) == 1


def test_options_of_another_method_are_refused():
    with pytest.raises(TypeError, match="set cache_type='DBPrune'"):
        dbcache.enable(tiny.pipeline("flux"), non_prune_block_ids=[3])
    with pytest.raises(ValueError, match="DBPrune"):
        dbcache.enable(tiny.pipeline("flux"), cache_type="FBCache")


def test_refresh_keeps_the_method():
    family = tiny.FAMILIES["wan"]
    config = DBPruneConfig(
        Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1.0, max_cached_steps=3
    )
    model = dbcache.enable(family.build(), config, enable_separate_cfg=False)
    tiny.denoise(model, family, 6)
    dbcache.refresh_context(model, num_inference_steps=8, max_cached_steps=-1)
    tiny.denoise(model, family, 8)
    (lane,) = dbcache.summary(model)
    assert lane.pruned_blocks == [0, 0, 7, 7, 7, 7, 7, 7]
    dbcache.refresh_context(model, non_prune_block_ids=[2])
    tiny.denoise(model, family, 8)
    assert dbcache.summary(model)[0].pruned_blocks == [0, 0, 6, 6, 6, 6, 6, 6]


def test_short_names_tell_settings_and_what_was_cached():
    pipe = dbcache.enable(
        tiny.pipeline("flux"),
        DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1.0),
        TaylorSeerCalibratorConfig(),
    )
    assert dbcache.strify(pipe) == "DBCache_F1B0_W2I1M0MC0_R1_T1O1"
    latents(pipe)
    assert dbcache.strify(pipe) == "DBCache_F1B0_W2I1M0MC0_R1_T1O1_S10"
    dbcache.enable(
        pipe, DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1.0)
    )
    latents(pipe)
    assert dbcache.strify(pipe) == "DBPrune_F1B0_W2I1M0MC0_R1_T0O0_S10_P75.0"
    with pytest.raises(RuntimeError, match="enabled on it first"):
        dbcache.strify(tiny.pipeline("flux"))


def test_the_summary_is_logged_and_lists_steps_on_request(caplog):
    pipe = dbcache.enable(
        tiny.pipeline("flux"),
        DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1.0),
    )
    latents(pipe)
    with caplog.at_level(logging.INFO, "dbcache"):
        dbcache.summary(pipe, logging=False)
        assert caplog.text == ""
        plain = dbcache.summary(pipe)
        assert str(plain) in caplog.text
    detailed = dbcache.summary(pipe, details=True)
    assert "1 2 3 4 5 6 7 8 9" in str(detailed)
    assert "1 2 3 4 5 6 7 8 9" not in str(plain)
    table = detailed.to_markdown().splitlines()
    assert sum(line.startswith("|---") for line in table) == 2
    assert table[0].count("|") == table[1].count("|")
    assert sum("| warm-up |" in line for line in table) == 2
    assert len(detailed) == 1
    assert detailed[0].steps == STEPS
    with pytest.raises(TypeError, match="details"):
        dbcache.summary(pipe, details="yes")
