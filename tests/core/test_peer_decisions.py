"""cache-dit 1.5.3 and dbcache decide alike on the same models, options and inputs.

Left out is what cache-dit is known to get wrong: requests of a bare transformer that are not
announced, the sum of diffs that never resets, forecasts before the fourth full step.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from cases import SHARED, STEPS, on_families
from engines import Run, assert_same, dbcache_lanes, run_dbcache, run_oracle, run_peer
from oracle import Rule
from tiny import FAMILIES, Family, denoise, pipeline

cache_dit = pytest.importorskip("cache_dit", minversion="1.5.3")

pytestmark = pytest.mark.usefixtures("one_thread")

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
engines = pytest.mark.parametrize("engine", [run_oracle, run_dbcache], ids=["oracle", "dbcache"])


def family_of(name: str) -> Family:
    """Return the family of a model ("flux") or a pipeline ("wan2.2 pipeline")."""
    return FAMILIES[name.removesuffix(" pipeline").removesuffix("2.2")]


def make(name: str):
    """Return a fresh model or pipeline."""
    if name.endswith("pipeline"):
        return pipeline(name.removesuffix(" pipeline"))
    return family_of(name).build()


@cache
def reference_of(name: str, rule: Rule, steps: int = STEPS, **how) -> Run:
    """Run cache-dit on a fresh copy, once for all engines that are compared with it."""
    return run_peer(make(name), family_of(name), rule, steps, **how)


def compare(engine, name: str, rule: Rule, steps: int = STEPS, **how) -> Run:
    """Run `engine` and cache-dit on fresh copies and compare decisions, diffs and outputs."""
    reference = reference_of(name, rule, steps, **how)
    assert_same(engine(make(name), family_of(name), rule, steps, **how), reference)
    return reference


@pytest.mark.covering(1)
@engines
@pytest.mark.parametrize(("case", "name"), on_families(SHARED))
def test_bare_transformer_equals_cache_dit(engine, case, name):
    compare(engine, name, replace(SHARED[case], enable_separate_cfg=False))


GUIDED = {
    "F1B0": Rule(residual_diff_threshold=0.1),
    "F2B1 order 1": Rule(
        Fn_compute_blocks=2, Bn_compute_blocks=1, residual_diff_threshold=0.13, order=1
    ),
    "limited": Rule(max_cached_steps=7, max_continuous_cached_steps=2, residual_diff_threshold=0.2),
    "second follows": Rule(cfg_diff_compute_separate=False, residual_diff_threshold=0.12),
}


@engines
@families
@pytest.mark.parametrize("case", GUIDED)
def test_alternating_calls_equal_cache_dit(engine, family, case):
    compare(engine, family.name, replace(GUIDED[case], enable_separate_cfg=True))


@engines
@families
def test_alternating_calls_with_the_unconditional_first_equal_cache_dit(engine, family):
    # cache-dit accepts cfg_compute_first only with shared diffs, and then shares none
    rule = Rule(enable_separate_cfg=True, cfg_compute_first=True, residual_diff_threshold=0.12)
    shared = replace(rule, cfg_diff_compute_separate=False)
    reference = reference_of(family.name, shared)
    assert_same(engine(family.build(), family, rule, STEPS), reference)


@engines
@pytest.mark.parametrize("name", ["flux", "qwen", "wan"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "true cfg"])
@pytest.mark.parametrize("order", [0, 1], ids=["reuse", "order 1"])
def test_pipeline_equals_cache_dit(engine, name, guided, order):
    rule = Rule(
        Fn_compute_blocks=2,
        residual_diff_threshold=0.15,
        max_continuous_cached_steps=3,
        enable_separate_cfg=guided,
        order=order,
    )
    reference = compare(engine, f"{name} pipeline", rule, guided=guided)
    assert any(lane.cached_steps for lane in reference.lanes)


@engines
def test_two_transformers_of_one_pipeline_equal_cache_dit(engine):
    rule = Rule(residual_diff_threshold=0.15, enable_separate_cfg=True, order=1)
    reference = compare(engine, "wan2.2 pipeline", rule, steps=32)
    assert len(reference.lanes) == 4
    assert all(lane.cached_steps for lane in reference.lanes)


@families
def test_announced_requests_equal_cache_dit(family):
    dbcache = pytest.importorskip("dbcache")
    rule = Rule(enable_separate_cfg=False, residual_diff_threshold=0.15, order=1)
    mine, theirs = family.build(), family.build()
    run_dbcache(mine, family, rule, 5)
    cache_dit.enable_cache(
        theirs,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            max_warmup_steps=4,
            residual_diff_threshold=0.15,
            enable_separate_cfg=False,
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    for seed, steps in ((5, STEPS), (6, 16)):
        dbcache.refresh_context(mine, num_inference_steps=steps)
        cache_dit.refresh_context(theirs, num_inference_steps=steps)
        outputs = denoise(mine, family, steps, seed=seed)
        expected = denoise(theirs, family, steps, seed=seed)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
        stats = cache_dit.summary(theirs, logging=False)[-1]
        assert dbcache_lanes(mine)[0].cached_steps == stats.cached_steps
    cache_dit.disable_cache(theirs)
