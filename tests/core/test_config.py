"""Configs: defaults, partial configs, and bad input."""

import copy
import pickle
import re

import numpy as np
import pytest
import tiny
import torch

import dbcache
from dbcache import (
    CalibratorConfig,
    DBCacheConfig,
    DBPruneConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    ParamsModifier,
    SpectrumCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from dbcache.config.cache import StackSettings, merge
from dbcache.config.policies import POLICIES


def test_defaults_are_the_peers():
    config = DBCacheConfig()
    assert (config.Fn_compute_blocks, config.Bn_compute_blocks) == (8, 0)
    assert (config.residual_diff_threshold, config.max_warmup_steps) == (0.08, 8)
    assert (config.max_cached_steps, config.max_continuous_cached_steps) == (-1, -1)
    assert config.important_condition_threshold == 0
    assert config.l1_hidden_states_diff_threshold == 0
    assert (config.batch_reduce, config.cache_dtype) == ("mean", "model")
    assert config.as_dict()["steps_computation_policy"] == "dynamic"


def test_names_the_nearest_option():
    with pytest.raises(TypeError, match="did you mean 'residual_diff_threshold'"):
        DBCacheConfig(residual_diff_treshold=0.1)
    with pytest.raises(TypeError, match="did you mean 'taylorseer_order'"):
        TaylorSeerCalibratorConfig(taylor_order=1)
    with pytest.raises(TypeError, match="did you mean 'max_warmup_steps'"):
        DBCacheConfig().update(warmup_steps=1)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("Fn_compute_blocks", 0, ValueError),
        ("Fn_compute_blocks", 1.0, TypeError),
        ("Fn_compute_blocks", True, TypeError),
        ("Bn_compute_blocks", -1, ValueError),
        ("residual_diff_threshold", -0.1, ValueError),
        ("residual_diff_threshold", float("nan"), ValueError),
        ("residual_diff_threshold", "0.1", TypeError),
        ("max_accumulated_residual_diff_threshold", 0, ValueError),
        ("batch_reduce", "sum", ValueError),
        ("important_condition_threshold", -0.5, ValueError),
        ("l1_hidden_states_diff_threshold", -0.5, ValueError),
        ("l1_hidden_states_diff_threshold", None, TypeError),
        ("important_condition_threshold", "0.5", TypeError),
        ("cache_dtype", "fp16", ValueError),
        ("cache_dtype", None, ValueError),
        ("max_warmup_steps", -1, ValueError),
        ("warmup_interval", 0, ValueError),
        ("max_cached_steps", -2, ValueError),
        ("max_continuous_cached_steps", "3", TypeError),
        ("num_inference_steps", 0, ValueError),
        ("enable_separate_cfg", 1, TypeError),
        ("cfg_compute_first", None, TypeError),
        ("steps_computation_policy", "fixed", ValueError),
        ("steps_computation_mask", [1, 2], ValueError),
        ("steps_computation_mask", [], ValueError),
        ("force_refresh_step_policy", "always", ValueError),
    ],
)
def test_rejects_bad_values_with_the_name_and_the_value(option, value, error):
    with pytest.raises(error, match=option) as caught:
        DBCacheConfig(**{option: value})
    assert repr(value) in str(caught.value)


def nested(levels=40):
    """Return 2**levels entries in a few lists, as aliases in YAML make them."""
    value = ["entry"]
    for _ in range(levels):
        value = [value, value]
    return value


LONG = {
    "aliases": nested,
    "aliases below a key": lambda: {"a": nested()},
    "text": lambda: "x" * 100_000,
    "numbers": lambda: list(range(100_000)),
    "an integer that has no text": lambda: 10**5000,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("value", LONG)
@pytest.mark.parametrize(
    "option",
    [
        "Fn_compute_blocks",
        "residual_diff_threshold",
        "policy",
        "Bn_compute_blocks_ids",
        "steps_computation_mask",
        "cfg_compute_first",
    ],
)
def test_errors_are_short_whatever_the_value_is(option, value):
    with pytest.raises((TypeError, ValueError), match=option) as caught:
        DBCacheConfig(**{option: LONG[value]()})
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_another_method_is_refused_with_its_config():
    with pytest.raises(ValueError, match="pass a DBPruneConfig"):
        DBCacheConfig(cache_type="DBPrune")
    with pytest.raises(ValueError, match="pass a DBCacheConfig"):
        DBPruneConfig(cache_type=dbcache.CacheType.DBCache)
    for off in ("NONE", dbcache.CacheType.NONE):
        with pytest.raises(ValueError, match=r"call dbcache\.disable"):
            DBCacheConfig(cache_type=off)
        with pytest.raises(ValueError, match=r"call dbcache\.disable"):
            dbcache.enable(tiny.pipeline("flux"), cache_type=off)


def test_the_name_of_an_unknown_option_is_cut():
    with pytest.raises(TypeError, match="unknown option 'xxx") as caught:
        DBCacheConfig(**{"x" * 100_000: 1})
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "verb", ["enable", "disable", "summary", "refresh_context", "start_request"]
)
def test_what_is_no_pipeline_is_refused_in_two_lines(verb):
    for target, got in ([[tiny.pipeline("flux")], r"\[FluxPipeline"], [None, "None"], ["x", "'x'"]):
        with pytest.raises(TypeError, match=rf"target must be a pipeline, .* got {got}") as caught:
            getattr(dbcache, verb)(target)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [
        (DBCacheConfig, "max_cached_steps", 2**31),
        (DBCacheConfig, "max_continuous_cached_steps", 2**40),
        (DBCacheConfig, "num_inference_steps", 2**31),
        (DBCacheConfig, "residual_diff_threshold", 1e39),
        (DBCacheConfig, "max_accumulated_residual_diff_threshold", 1e39),
        (DBPruneConfig, "max_pruned_steps", 2**31),
        (DBPruneConfig, "max_dynamic_prune_threshold", float("inf")),
        (FoCaCalibratorConfig, "foca_horizon", 1e39),
    ],
)
def test_what_the_device_cannot_hold_is_refused_at_once(config, option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*got {re.escape(repr(value))}"):
        config(**{option: value})


def test_the_largest_that_the_device_holds_is_taken():
    assert DBCacheConfig(max_cached_steps=2**31 - 1).max_cached_steps == 2**31 - 1
    assert DBCacheConfig(residual_diff_threshold=3.4e38).residual_diff_threshold == 3.4e38


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_numbers_of_numpy_and_torch_are_numbers(kind):
    is_numpy = kind == "numpy"
    config = DBCacheConfig(
        max_warmup_steps=np.int64(3) if is_numpy else torch.tensor(3),
        residual_diff_threshold=np.float32(0.25) if is_numpy else torch.tensor(0.25),
        Bn_compute_blocks=np.int32(2) if is_numpy else torch.tensor(2),
        Bn_compute_blocks_ids=np.array([1, 0]) if is_numpy else torch.tensor([1, 0]),
        steps_computation_mask=np.array([1, 0, 1]) if is_numpy else torch.tensor([1, 0, 1]),
    )
    assert config == DBCacheConfig(
        max_warmup_steps=3,
        residual_diff_threshold=0.25,
        Bn_compute_blocks=2,
        Bn_compute_blocks_ids=[0, 1],
        steps_computation_mask=[1, 0, 1],
    )
    assert type(config.max_warmup_steps) is int
    assert type(config.residual_diff_threshold) is float
    for value in (np.float64("nan"), np.float32("inf"), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match="residual_diff_threshold"):
            DBCacheConfig(residual_diff_threshold=value)
    for value in (np.bool_(True), torch.tensor(True), torch.tensor(2.0), torch.tensor([2])):
        with pytest.raises(TypeError, match="must be an integer, got"):
            DBCacheConfig(max_warmup_steps=value)


def test_attributes_are_checked_as_options_are():
    config = DBCacheConfig(Fn_compute_blocks=2)
    with pytest.raises(AttributeError, match="did you mean 'max_warmup_steps'"):
        config.max_warmup_step = 4
    with pytest.raises(ValueError, match=r"DBCacheConfig\.max_warmup_steps .* got -1"):
        config.max_warmup_steps = -1
    assert config == DBCacheConfig(Fn_compute_blocks=2)
    config.max_warmup_steps = 4
    assert config.given == {"Fn_compute_blocks": 2, "max_warmup_steps": 4}
    assert merge(DBCacheConfig(max_warmup_steps=1), config).max_warmup_steps == 4
    assert copy.copy(config).given == pickle.loads(pickle.dumps(config)).given == config.given


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("do_separate_classifier_free_guidance", "enable_separate_cfg is its name now"),
        ("taylorseer_kwargs", "its n_derivatives is taylorseer_order now"),
    ],
)
def test_options_of_other_versions_say_what_to_use(name, hint):
    pipe = tiny.pipeline("flux")
    with pytest.raises(TypeError, match=f"unknown option '{name}'; {hint}"):
        dbcache.enable(pipe, **{name: True})


def test_none_is_what_was_not_given():
    config = DBCacheConfig(Fn_compute_blocks=2)
    assert config.reset(max_warmup_steps=None, warmup_interval=3).given == {"warmup_interval": 3}
    assert config == DBCacheConfig(warmup_interval=3)
    with pytest.raises(TypeError, match="did you mean 'max_warmup_steps'"):
        config.reset(max_warmup_step=None)
    assert config.given == {"warmup_interval": 3}


def test_the_annotation_names_all_policies():
    for policy in POLICIES:
        assert DBCacheConfig(policy=policy).policy == policy
    with pytest.raises(ValueError, match="policy must be one of") as caught:
        DBCacheConfig(policy="other")
    assert str(tuple(POLICIES)) in str(caught.value)


def test_rejects_masks_that_cannot_be_run():
    with pytest.raises(ValueError, match=r"must hold only 0 and 1, got \[1, 5, 0\]"):
        DBCacheConfig(steps_computation_mask=iter([1, 5, 0]))
    with pytest.raises(ValueError, match="4 for 5 steps"):
        DBCacheConfig(steps_computation_mask=[1, 0, 0, 1], num_inference_steps=5)
    with pytest.raises(ValueError, match="must begin with 1"):
        DBCacheConfig(steps_computation_mask=[0, 1], steps_computation_policy="static")


def test_rejects_bad_calibrators():
    with pytest.raises(ValueError, match="taylorseer_order"):
        TaylorSeerCalibratorConfig(taylorseer_order=5)
    with pytest.raises(ValueError, match="hermite_order must be an integer from 0 to 4, got 5"):
        HermiteCalibratorConfig(hermite_order=5)
    with pytest.raises(ValueError, match=r"sigma must be at most 1, got 1\.5"):
        HermiteCalibratorConfig(sigma=1.5)
    with pytest.raises(ValueError, match="sigma must be a number > 0, got 0"):
        HermiteCalibratorConfig(sigma=0)
    with pytest.raises(TypeError, match="exact must be True or False, got 1"):
        TaylorSeerCalibratorConfig(exact=1)
    for calibrator, field, value, allowed in (
        (FoCaCalibratorConfig, "foca_horizon", 0, "a number > 0"),
        (DMDCalibratorConfig, "dmd_history", 2, "an integer from 3 to 8"),
        (DMDCalibratorConfig, "dmd_ridge", 0.0, "a number > 0"),
        (DMDCalibratorConfig, "dmd_rank", 3, r"one of \(0, 2\)"),
        (DMDCalibratorConfig, "dmd_svd_precision", "exact", "one of"),
        (SpectrumCalibratorConfig, "spectrum_order", 5, "an integer from 1 to 4"),
        (SpectrumCalibratorConfig, "spectrum_window", 9, "an integer from 2 to 8"),
        (SpectrumCalibratorConfig, "spectrum_ridge", 0, "a number > 0"),
        (SpectrumCalibratorConfig, "spectrum_blend", 1.5, "at most 1"),
    ):
        with pytest.raises(ValueError, match=f"{field} must be {allowed}.* got {value!r}"):
            calibrator(**{field: value})
    with pytest.raises(ValueError, match="calibrator_cache_type"):
        TaylorSeerCalibratorConfig(calibrator_cache_type="hidden")
    with pytest.raises(TypeError, match=r"ParamsModifier\.cache_config"):
        ParamsModifier(cache_config={"Fn_compute_blocks": 1})


def test_failed_update_changes_nothing():
    config = DBCacheConfig(Fn_compute_blocks=2)
    with pytest.raises(ValueError, match="warmup_interval"):
        config.update(Fn_compute_blocks=3, warmup_interval=0)
    assert config == DBCacheConfig(Fn_compute_blocks=2)


def test_partial_configs_change_only_what_they_were_given():
    base = DBCacheConfig(Fn_compute_blocks=2, max_warmup_steps=3, residual_diff_threshold=0.2)
    for partial in (
        DBCacheConfig(max_warmup_steps=8),
        DBCacheConfig(Fn_compute_blocks=4).reset(max_warmup_steps=8),
        DBCacheConfig().update(max_warmup_steps=8, Fn_compute_blocks=None),
    ):
        merged = merge(base, partial)
        expected = (2, 8, 0.2)
        got = merged.Fn_compute_blocks, merged.max_warmup_steps, merged.residual_diff_threshold
        assert got == expected
    assert base.max_warmup_steps == 3


def test_modifier_with_a_calibrator_alone_counts():
    settings = StackSettings(DBCacheConfig(), CalibratorConfig())
    taylor = TaylorSeerCalibratorConfig(taylorseer_order=2)
    assert settings.modified(ParamsModifier(calibrator_config=taylor)).orders == (2, 2)
    assert settings.modified(None).orders == (0, 0)
    assert settings.modified(ParamsModifier(calibrator_config=taylor)).slots == 3


def test_modifiers_take_options_by_name():
    modifier = ParamsModifier(Fn_compute_blocks=1, enable_taylorseer=True, taylorseer_order=2)
    assert modifier.cache_config.given == {"Fn_compute_blocks": 1}
    assert modifier.calibrator_config.strify() == "T1O2"
    modifier = ParamsModifier(DBCacheConfig(max_warmup_steps=4), Fn_compute_blocks=1)
    assert modifier.cache_config.given == {"Fn_compute_blocks": 1, "max_warmup_steps": 4}
    modifier = ParamsModifier(DBPruneConfig(max_warmup_steps=4), non_prune_block_ids=[2])
    assert modifier.cache_config == DBPruneConfig(max_warmup_steps=4, non_prune_block_ids=[2])
    assert ParamsModifier() == ParamsModifier(None, None)
    with pytest.raises(TypeError, match=r"ParamsModifier: unknown option .* 'Fn_compute_blocks'"):
        ParamsModifier(Fn_compute_block=1)
    with pytest.raises(ValueError, match="together with a predictor's options"):
        ParamsModifier(calibrator_config=FoCaCalibratorConfig(), enable_taylorseer=True)
    with pytest.raises(ValueError, match=r"Fn_compute_blocks .* got 0"):
        ParamsModifier(Fn_compute_blocks=0)


def test_strify_tells_settings_apart():
    config = DBCacheConfig(Fn_compute_blocks=1, max_cached_steps=7, residual_diff_threshold=0.12)
    assert config.strify() == "DBCache_F1B0_W8I1M7MC0_R0.12"
    other = DBCacheConfig(batch_reduce="max", important_condition_threshold=0.5)
    assert other.strify().endswith("_R0.08_BRmax_IC0.5")
    hidden = DBCacheConfig(l1_hidden_states_diff_threshold=0.2)
    assert hidden.strify().endswith("_R0.08_HS0.2")
    assert DBPruneConfig(max_pruned_steps=12).strify().startswith("DBPrune_F8B0_W8I1M12MC0_")
    assert DBPruneConfig(max_cached_steps=12).strify().startswith("DBPrune_F8B0_W8I1M12MC0_")
    named = DBCacheConfig(steps_computation_mask="slow")
    assert named.strify().endswith("_SCMslow_dynamic")
    assert named.update(num_inference_steps=8).strify().endswith("_SCM11111011_dynamic_N8")
    assert config.update(cache_dtype="fp8").strify() == "DBCache_F1B0_W8I1M7MC0_R0.12_Dfp8"
    assert TaylorSeerCalibratorConfig(taylorseer_order=2).strify() == "T1O2"
    assert TaylorSeerCalibratorConfig(taylorseer_order=0).strify() == "T0O0"
    assert TaylorSeerCalibratorConfig(taylorseer_order=2, exact=True).strify() == "T1O2E"
    assert HermiteCalibratorConfig(hermite_order=2).strify() == "H1O2S0.5"
    assert FoCaCalibratorConfig().strify() == "FoCa"
    assert FoCaCalibratorConfig(foca_horizon=2).strify() == "FoCaH2"
    assert DMDCalibratorConfig(dmd_history=6).strify() == "DMDH6"
    assert DMDCalibratorConfig(dmd_ridge=0.1).strify() == "DMDH4R0.1"
    assert SpectrumCalibratorConfig().strify() == "SpectrumO4W8R0.0001B0.5"
