"""The policies without a probe do on real, tiny diffusers models what their formulas say."""

import json
from dataclasses import replace

import models
import pytest
import torch
from engines import dbcache_lanes, drive, options
from policy_engines import BASE, CALIBRATED, LETTERS, STEPS, calibration, run_both
from tiny import BRANCHES, FAMILIES, denoise, generate, pipeline

import dbcache
from dbcache.kernels.common.select import reset_environment

pytestmark = pytest.mark.usefixtures("one_thread")

POLICIES = ("easycache", "teacache", "seacache", "magcache")
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
policies = pytest.mark.parametrize("policy", POLICIES)


@families
@policies
def test_decides_and_predicts_as_the_formulas_say(policy, family):
    run = run_both(family, replace(BASE, policy=policy))
    (lane,) = run.lanes
    assert 3 <= len(lane.cached_steps) <= STEPS - 6
    assert {"below threshold", "above threshold"} <= set(lane.reasons)


@pytest.mark.covering(1)
@policies
@pytest.mark.parametrize(
    "changes",
    [
        {"order": 1, "Bn_compute_blocks": 2},
        {"order": 2, "max_continuous_cached_steps": 2, "max_cached_steps": 8},
        {"max_accumulated_residual_diff_threshold": 0.0613, "warmup_interval": 2},
        {"steps_computation_mask": (1, 1, 0, 0, 1, 0) * 4, "max_warmup_steps": 6},
        {
            "steps_computation_mask": (1, 1, 0, 0, 1, 0) * 4,
            "steps_computation_policy": "static",
        },
        {"residual_diff_threshold": 5.0, "max_continuous_cached_steps": 5},
        {"max_warmup_steps": 0},
        {"retention_ratio": 0.3, "num_inference_steps": STEPS, "warmup_interval": 3},
    ],
    ids=["order 1", "order 2", "accumulated", "mask", "static", "high", "no warm-up", "retention"],
)
def test_combines_with_limits_masks_and_predictors(policy, changes):
    names = list(FAMILIES)
    family = FAMILIES[names[(POLICIES.index(policy) + len(str(changes))) % 3]]
    rule = replace(BASE, policy=policy, **changes)
    calibrator = None
    if rule.order:
        calibrator = dbcache.TaylorSeerCalibratorConfig(taylorseer_order=rule.order)
    run = run_both(family, rule, calibrator=calibrator)
    assert run.lanes[0].cached_steps


@pytest.mark.parametrize(
    ("policy", "name"), list(zip(POLICIES, ("qwen", "wan", "qwen", "wan"), strict=True))
)
def test_guidance_branches_have_lanes_of_their_own(policy, name):
    rule = replace(BASE, policy=policy, enable_separate_cfg=True)
    run = run_both(FAMILIES[name], rule)
    assert [lane.branch for lane in run.lanes] == list(BRANCHES)
    assert all(lane.cached_steps for lane in run.lanes)


@pytest.mark.parametrize(("policy", "name"), [("teacache", "flux"), ("seacache", "wan")])
def test_the_worst_sample_of_a_batch_decides_if_asked_to(policy, name):
    rule = replace(BASE, policy=policy, residual_diff_threshold=0.1537)
    whole = run_both(FAMILIES[name], rule, batch=3)
    worst = run_both(FAMILIES[name], replace(rule, batch_reduce="max"), batch=3)
    assert worst.lanes[0].diffs != whole.lanes[0].diffs


@pytest.mark.parametrize("policy", ["easycache", "seacache"])
def test_a_batch_takes_one_decision_over_all_its_samples(policy):
    run = run_both(FAMILIES["qwen"], replace(BASE, policy=policy), batch=3)
    assert run.lanes[0].cached_steps


@pytest.mark.parametrize("policy", ["easycache", "teacache", "seacache"])
def test_a_branch_may_take_the_measurement_of_the_other(policy):
    family = FAMILIES["wan"]
    rule = replace(BASE, policy=policy, enable_separate_cfg=True)
    content = calibration("wan", policy, BRANCHES) if policy in CALIBRATED else None
    lanes = []
    for separate in (True, False):
        config = dbcache.DBCacheConfig(
            **options(replace(rule, cfg_diff_compute_separate=separate)), calibration=content
        )
        model = dbcache.enable(family.build(), cache_config=config)
        drive(model, family, rule, STEPS)
        lanes.append(dbcache_lanes(model))
    separate, shared = lanes
    assert separate[0].reasons == shared[0].reasons
    if policy != "easycache":  # both branches get the same latents and times, the rates differ
        assert shared[1].diffs == shared[0].diffs


@pytest.mark.parametrize(
    ("policy", "name"), list(zip(POLICIES, ("wan", "flux", "qwen", "flux"), strict=True))
)
def test_threshold_0_is_bit_identical_and_so_is_disable(policy, name):
    family = FAMILIES[name]
    model = family.build()
    plain = denoise(model, family, 8)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    content = calibration(family.name, policy) if policy in CALIBRATED else None
    for threshold in (0.0, 1e9):
        rule = replace(BASE, policy=policy, residual_diff_threshold=threshold)
        config = dbcache.DBCacheConfig(**options(rule), calibration=content)
        dbcache.enable(model, cache_config=config)
        outputs = denoise(model, family, 8)
        assert all(map(torch.equal, outputs, plain)) == (threshold == 0)
        dbcache.disable(model)
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(map(torch.equal, denoise(model, family, 8), plain))


@policies
def test_no_block_runs_on_a_cached_step(policy):
    family = FAMILIES["qwen"]
    model, calls = family.build(), []
    content = calibration("qwen", policy) if policy in CALIBRATED else None
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    config = dbcache.DBCacheConfig(**options(replace(BASE, policy=policy)), calibration=content)
    dbcache.enable(model, cache_config=config)
    denoise(model, family, STEPS)
    (lane,) = dbcache.summary(model).lanes
    assert lane.cached_steps
    assert calls == list(range(8)) * (STEPS - len(lane.cached_steps))


@pytest.mark.parametrize(
    ("policy", "name"), list(zip(POLICIES, ("flux", "qwen", "wan", "flux"), strict=True))
)
def test_each_request_of_a_pipeline_starts_anew(policy, name):
    pipe = pipeline(name)
    plain = generate(pipe, 16)
    content = None
    if policy in CALIBRATED:
        with dbcache.calibrate(pipe, policy=policy) as content:
            assert all(map(torch.equal, generate(pipe, 16), plain))
        assert content["steps"] == 16
    settings = {"policy": policy, "max_warmup_steps": 3, "residual_diff_threshold": 0.1}
    dbcache.enable(pipe, calibration=content, **settings)
    first = generate(pipe, 16)
    summary = dbcache.summary(pipe)
    assert {lane.policy for lane in summary.lanes} == {policy}
    assert policy in str(summary)
    assert [lane.branch for lane in summary.lanes] == list(BRANCHES)
    assert all(lane.cached_steps for lane in summary.lanes)
    generate(pipe, 9, seed=6)
    assert all(map(torch.equal, generate(pipe, 16), first))
    dbcache.disable(pipe)
    assert all(map(torch.equal, generate(pipe, 16), plain))


def test_a_change_of_shape_starts_the_signal_again():
    rule = replace(BASE, policy="easycache", residual_diff_threshold=1e9, num_inference_steps=30)
    rule, family = replace(rule, max_warmup_steps=2), FAMILIES["wan"]
    model = dbcache.enable(family.build(), cache_config=dbcache.DBCacheConfig(**options(rule)))
    for height, steps in ((8, 4), (12, 4)):
        for step in range(steps):
            x = torch.full((1, 4, 3, height, 8), 1.0 + 0.1 * step)
            with torch.no_grad():
                model(**family.arguments(x, 1 - 0.1 * step, "cond"))
    (lane,) = dbcache.summary(model).lanes
    # a rate needs two full steps of the new shape
    assert [LETTERS[reason] for reason in lane.reasons] == list("WWbbSNbb")


@policies
def test_an_exception_makes_the_step_count_as_never_begun(policy):
    family = FAMILIES["qwen"]
    content = calibration("qwen", policy) if policy in CALIBRATED else None
    rule = replace(BASE, policy=policy, residual_diff_threshold=1e9, num_inference_steps=30)
    config = dbcache.DBCacheConfig(**options(rule), calibration=content)
    model = dbcache.enable(family.build(), cache_config=config)
    denoise(model, family, 6)

    def fail(*_):
        raise KeyError("interrupted")

    hook = model.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="interrupted"):
        denoise(model, family, 1)
    hook.remove()
    denoise(model, family, 3)
    (lane,) = dbcache.summary(model).lanes
    reasons = "".join(LETTERS[reason] for reason in lane.reasons)
    assert reasons == ("WWWbbbNNb" if policy == "easycache" else "WWWbbbNbb")


def test_bfloat16_follows_float32():
    for policy in ("easycache", "seacache"):
        family = FAMILIES["flux"]
        config = dbcache.DBCacheConfig(**options(replace(BASE, policy=policy)))
        lanes = []
        for model in (family.build(), family.build().bfloat16()):
            dbcache.enable(model, cache_config=config)
            denoise(model, family, STEPS)
            lanes.extend(dbcache.summary(model).lanes)
        assert lanes[0].diffs.keys() == lanes[1].diffs.keys()
        for step in list(lanes[0].diffs)[:3]:
            assert lanes[1].diffs[step] == pytest.approx(lanes[0].diffs[step], rel=0.1)
        assert abs(len(lanes[0].cached_steps) - len(lanes[1].cached_steps)) <= 2


@pytest.mark.parametrize("policy", ["easycache", "seacache"])
def test_kernels_and_references_take_the_same_decisions(policy, monkeypatch):
    family, runs = FAMILIES["wan"], []
    rule = replace(BASE, policy=policy, residual_diff_threshold=0.3037)
    config = dbcache.DBCacheConfig(**options(rule))
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("DBCACHE_KERNELS", kernels)
        reset_environment()
        model = dbcache.enable(family.build(), cache_config=config)
        outputs = denoise(model, family, 10)
        (lane,) = dbcache.summary(model).lanes
        runs.append((outputs, lane.reasons, lane.diffs))
    monkeypatch.undo()
    reset_environment()
    (outputs, *expected), (others, *got) = runs
    assert got[0] == expected[0]
    assert got[1] == pytest.approx(expected[1], rel=1e-5)  # the sums are over other partitions
    assert {"below threshold", "above threshold"} <= set(got[0])
    for x, y in zip(outputs, others, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_one_decision_for_all_stacks_needs_no_probe_either():
    family = FAMILIES["flux"]
    model = family.build()
    adapter = dbcache.BlockAdapter(
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=dbcache.ForwardPattern.Pattern_1,
    )
    settings = {"policy": "easycache", "max_warmup_steps": 3, "residual_diff_threshold": 0.1}
    dbcache.enable(adapter, decision_scope="model", **settings)
    calls = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    denoise(model, family, STEPS)
    first, second = dbcache.summary(model).lanes
    assert first.cached_steps == second.cached_steps != []
    assert len(calls) == 10 * (STEPS - len(first.cached_steps))


# --- traces worked out by hand ---


def test_latents_may_be_a_list_of_tensors_under_another_name():
    name = "ZImageTransformer2DModel"
    model = models.model(name)
    settings = {"policy": "easycache", "max_warmup_steps": 2, "residual_diff_threshold": 1e9}
    dbcache.enable(model, enable_separate_cfg=False, **settings)
    models.run(name, 5)
    (lane,) = dbcache.summary(model).lanes
    dbcache.disable(model)
    assert "".join(LETTERS[reason] for reason in lane.reasons) == "WWbbb"
    assert all(0 < diff < 100 for diff in lane.diffs.values())


def test_models_without_latents_in_floating_point_are_refused():
    name = "UVit2DModel"  # denoises tokens
    model = dbcache.enable(models.model(name), policy="easycache")
    with pytest.raises(ValueError, match="tensors of one shape in floating point, as input_ids"):
        models.run(name, 1)
    dbcache.disable(model)


# --- what does not go together ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"policy": "easycache", "l1_hidden_states_diff_threshold": 0.1},
            r"l1_hidden_states_diff_threshold must be 0.0 with policy='easycache', got 0.1: no "
            r"probe block runs whose output could be compared; leave it out, or use policy",
        ),
        (
            {"policy": "seacache", "important_condition_threshold": 0.1},
            "important_condition_threshold must be 0.0 with policy='seacache'",
        ),
        (
            {"policy": "easycache", "batch_reduce": "max"},
            "batch_reduce must be 'mean' with policy='easycache', got 'max': the rate is that of",
        ),
        (
            {"policy": "magcache", "cfg_diff_compute_separate": False},
            "cfg_diff_compute_separate must be True with policy='magcache', got False: nothing is",
        ),
        (
            {"policy": "easycache", "calibration": "x.json"},
            "calibration must come with a policy of .'teacache', 'magcache'., got policy='easycac",
        ),
        ({"policy": "magcache"}, "must have a calibration, got None; make one with dbcache.calibr"),
        ({"policy": "fbcache"}, "DBCacheConfig.policy must be one of .'dbcache', 'easycache'"),
        ({"retention_ratio": 1.5}, "DBCacheConfig.retention_ratio must be at most 1, got 1.5"),
        (
            {"policy": "magcache", "calibration": {"format": "other"}},
            "must be of format 'dbcache calibration 1' with stacks, got 'other'; make one",
        ),
    ],
)
def test_refuses_with_the_reason(settings, message):
    model = FAMILIES["flux"].build()
    with pytest.raises(ValueError, match=message):
        dbcache.enable(model, **settings)
    assert "forward" not in vars(model)


def test_retention_needs_the_number_of_steps():
    family = FAMILIES["flux"]
    model = dbcache.enable(family.build(), policy="easycache", retention_ratio=0.2)
    with pytest.raises(ValueError, match=r"number of steps must be known for retention_ratio=0.2"):
        denoise(model, family, 1)


def test_models_that_a_signal_does_not_know_are_refused():
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(4)])
    adapter = dbcache.BlockAdapter(
        transformer=model,
        blocks=model.blocks,
        forward_pattern=dbcache.ForwardPattern.Pattern_3,
    )
    with pytest.raises(ValueError, match="must know the timesteps of the model, got Module; known"):
        dbcache.enable(adapter, policy="seacache")
    with pytest.raises(ValueError, match=r"policy='teacache': Module must have a calibration, got"):
        dbcache.enable(adapter, policy="teacache")
    with (
        pytest.raises(ValueError, match="how the first block modulates its input, got a Linear"),
        dbcache.calibrate(adapter, policy="teacache"),
    ):
        pass


def test_names_and_files_know_the_policy(tmp_path):
    config = dbcache.DBCacheConfig(policy="easycache", retention_ratio=0.25)
    assert config.strify() == "EasyCache_F0B0_W8I1M0MC0_R0.08_RR0.25"
    path = tmp_path / "cache.json"
    path.write_text(json.dumps({"cache_config": {"policy": "magcache", "calibration": "m.json"}}))
    loaded = dbcache.load_configs(path)["cache_config"]
    assert loaded.given == {"policy": "magcache", "calibration": "m.json"}
    with pytest.raises(TypeError, match="unknown option 'polcy'; did you mean 'policy'"):
        dbcache.load_configs({"polcy": "easycache"})


@pytest.mark.parametrize("policy", ["easycache", "seacache", "magcache"])
def test_memory_is_the_ring_and_what_is_compared(policy):
    family = FAMILIES["wan"]
    content = calibration("wan", policy) if policy == "magcache" else None
    rule = replace(BASE, policy=policy)
    config = dbcache.DBCacheConfig(**options(rule), calibration=content)
    calibrator = dbcache.TaylorSeerCalibratorConfig(taylorseer_order=1)
    model = dbcache.enable(family.build(), cache_config=config, calibrator_config=calibrator)
    denoise(model, family, 6)
    latents, hidden = 4 * 3 * 8 * 8 * 4, 3 * 16 * 24 * 4
    # EasyCache: the latest latents, and the input and output of the latest full step
    kept = {"easycache": 3 * latents, "seacache": latents, "magcache": 0}[policy]
    assert dbcache.summary(model).lanes[0].megabytes * 1e6 == pytest.approx(2 * hidden + kept)
