"""dbcache does on real, tiny diffusers models what the oracle does: same decisions, same outputs.

The oracle itself is held to traces worked out by hand, and to cache-dit in test_peer_decisions.
"""

from dataclasses import replace

import pytest
import torch
from cases import OWN, SHARED, STEPS, on_families
from engines import Run, assert_same, dbcache_lanes, options, run_dbcache, run_oracle
from oracle import Decider, Oracle, Rule, Series
from tiny import BRANCHES, FAMILIES, denoise, flux, generate, noise, pipeline

from dbcache import DBCacheConfig, ParamsModifier, disable, enable, refresh_context, summary

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = SHARED | OWN
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
pipelines = pytest.mark.parametrize("name", ["flux", "qwen", "wan"])


def trace_of(rule: Rule, diffs: list[float]) -> str:
    """Return one letter per step, F or c, where `diffs` are the changes that would be measured."""
    decider = Decider(rule)
    for step, diff in enumerate(diffs):
        decider.decide(lambda step=step, diff=diff: diff if step else "no reference")
    return "".join("F" if full else "c" for full in decider.trace.full)


SIMILAR = [0.02] * 16
GOLDEN = {
    "FFFFcccccccccccc": Rule(),
    "FFFFcFcFcFcFcFcF": Rule(max_continuous_cached_steps=1),
    "FFFFccFccFccFccF": Rule(max_continuous_cached_steps=2),
    "FFFFcccFFFFFFFFF": Rule(max_cached_steps=3),
    "FFFFFFFFFFFFFFFF": Rule(residual_diff_threshold=0.0),
    "FcFcFcFccccccccc": Rule(max_warmup_steps=8, warmup_interval=2),
    "Fccccccccccccccc": Rule(max_warmup_steps=0),
    # 0.02 + 0.02 + 0.02 reaches the limit, and the count starts again after the full step
    "FFFFcccFcccFcccF": Rule(max_accumulated_residual_diff_threshold=0.05),
    # two leading ones cap the warm-up at 2; beyond the mask a step counts as 0
    "FFcFccFccccccccc": Rule(max_warmup_steps=8, steps_computation_mask=(1, 1, 0, 1, 0, 0, 1, 0)),
}


@pytest.mark.parametrize("expected", GOLDEN)
def test_the_oracle_decides_as_worked_out_by_hand(expected):
    assert trace_of(GOLDEN[expected], SIMILAR) == expected


def test_the_oracle_compares_strictly_and_forgets_the_sum_on_a_full_step():
    diffs = [0.0, 0.0, 0.04, 0.08, 0.04, 0.07, 0.05, 0.01, 0.2, 0.07]
    rule = Rule(max_warmup_steps=1, max_accumulated_residual_diff_threshold=0.1)
    assert trace_of(rule, diffs) == "FccFcc" + "FcFc"


def test_the_oracle_ignores_the_threshold_on_static_steps():
    mask = (1, 1, 0, 0, 1, 0)
    rule = Rule(steps_computation_mask=mask, steps_computation_policy="static", max_cached_steps=1)
    assert trace_of(rule, [0.9] * 6) == "FFccFc"


def test_the_oracle_forecasts_as_worked_out_by_hand():
    series = Series(Rule(order=2))
    for step in (3, 4, 6):
        series.add(step, torch.tensor(float((step - 3) ** 2)))
    # D1 = (9 - 1) / 2 = 4, before that (1 - 0) / 1 = 1, D2 = (4 - 1) / 2 = 1.5
    assert series.forecast(8).item() == 9 + 2 * 4 + 2 * 1.5
    series.steps = [2, 3, 5]  # only the newest two differ from step 3 on
    assert series.forecast(7).item() == 9 + 2 * 4 + 2 * 1.5
    series.steps = [1, 2, 4]
    assert series.forecast(6).item() == 9 + 2 * 4
    first = Series(Rule(order=1))
    first.add(4, torch.tensor(7.0))
    assert first.forecast(6).item() == 7.0
    first.add(6, torch.tensor(8.0))
    assert first.forecast(9).item() == 9.5


@families
def test_the_oracle_is_the_plain_model_when_it_never_caches(family):
    model = family.build()
    plain = denoise(model, family, 6)
    rule = Rule(Fn_compute_blocks=2, Bn_compute_blocks=1, residual_diff_threshold=0.0)
    with Oracle(model, family.lists, family.encoder_first, rule):
        outputs = denoise(model, family, 6)
    assert all(map(torch.equal, outputs, plain))


@families
def test_thresholds_of_the_cases_split_the_steps(family):
    rule = SHARED["F1B0"]
    (lane,) = run_oracle(family.build(), family, rule, STEPS).lanes
    assert 4 <= len(lane.cached_steps) <= STEPS - 8
    assert min(lane.diffs.values()) < rule.residual_diff_threshold < max(lane.diffs.values())


@pytest.mark.parametrize(("case", "name"), on_families(ALL))
def test_bare_transformer_equals_the_oracle(case, name):
    family = FAMILIES[name]
    rule = replace(ALL[case], enable_separate_cfg=False)
    mine = run_dbcache(family.build(), family, rule, STEPS)
    assert_same(mine, run_oracle(family.build(), family, rule, STEPS))


@pytest.mark.parametrize(("name", "threshold"), [("flux", 0.14), ("qwen", 0.06), ("wan", 0.12)])
def test_the_worst_sample_of_a_batch_decides_if_asked_to(name, threshold):
    family, cached = FAMILIES[name], {}
    for batch_reduce in ("mean", "max"):
        rule = Rule(
            residual_diff_threshold=threshold, batch_reduce=batch_reduce, enable_separate_cfg=False
        )
        mine = run_dbcache(family.build(), family, rule, STEPS, batch=3)
        assert_same(mine, run_oracle(family.build(), family, rule, STEPS, batch=3))
        cached[batch_reduce] = len(mine.lanes[0].cached_steps)
    assert 0 < cached["max"] < cached["mean"]


@families
@pytest.mark.parametrize("how", ["one", "max", "shared"])
def test_important_tokens_decide_alone(family, how):
    """Of a batch, of its worst sample, and where a branch takes the other's diff."""
    steps, batch = 16, 1 if how == "shared" else 3
    rule = Rule(
        residual_diff_threshold=0.13,
        important_condition_threshold=0.08,
        batch_reduce="max" if how == "max" else "mean",
        enable_separate_cfg=how == "shared",
        cfg_diff_compute_separate=how != "shared",
    )
    mine = run_dbcache(family.build(), family, rule, steps, batch=batch)
    assert_same(mine, run_oracle(family.build(), family, rule, steps, batch=batch))
    all_tokens = replace(rule, important_condition_threshold=0.0)
    plain = run_dbcache(family.build(), family, all_tokens, steps, batch=batch)
    assert mine.lanes[0].diffs != plain.lanes[0].diffs


@pytest.mark.parametrize("mask", [None, ((1,) * 5 + (0,) * 9 + (1,)) * 10], ids=["diff", "mask"])
def test_a_long_request_equals_the_oracle(mask):
    family = FAMILIES["flux"]
    rule = Rule(
        residual_diff_threshold=0.08,
        order=1,
        max_continuous_cached_steps=6,
        steps_computation_mask=mask,
    )
    mine = run_dbcache(family.build(), family, rule, 150)
    assert mine.lanes[0].cached_steps[-1] > 130
    assert_same(mine, run_oracle(family.build(), family, rule, 150))


@families
def test_fn_and_bn_that_leave_no_middle_change_nothing(family):
    model = family.build()
    count = sum(len(getattr(model, name)) for name in family.lists)
    plain = denoise(model, family, STEPS)
    rule = Rule(
        Fn_compute_blocks=count - 3,
        Bn_compute_blocks=3,
        residual_diff_threshold=0.2,
        order=1,
        enable_separate_cfg=False,
    )
    with pytest.warns(UserWarning, match="leaves none"):
        mine = run_dbcache(model, family, rule, STEPS)
    assert all(map(torch.equal, mine.outputs, plain))


GUIDED = {
    "F1B0": Rule(residual_diff_threshold=0.1),
    "F2B1 order 1": Rule(
        Fn_compute_blocks=2, Bn_compute_blocks=1, residual_diff_threshold=0.13, order=1
    ),
    "limited": Rule(max_cached_steps=7, max_continuous_cached_steps=2, residual_diff_threshold=0.2),
    "second follows": Rule(cfg_diff_compute_separate=False, residual_diff_threshold=0.12),
}


@families
@pytest.mark.parametrize("case", GUIDED)
def test_alternating_calls_equal_the_oracle(family, case):
    rule = replace(GUIDED[case], enable_separate_cfg=True)
    mine = run_dbcache(family.build(), family, rule, STEPS)
    assert_same(mine, run_oracle(family.build(), family, rule, STEPS))


@pytest.mark.parametrize(("name", "alternates"), [("flux", False), ("qwen", True), ("wan", True)])
def test_calls_alternate_unasked_where_the_pipelines_of_the_model_do(name, alternates):
    family, rule = FAMILIES[name], Rule(residual_diff_threshold=0.12)
    branches = BRANCHES if alternates else ("cond",)
    mine = run_dbcache(family.build(), family, rule, STEPS, branches=branches)
    rule = replace(rule, enable_separate_cfg=alternates)
    assert_same(mine, run_oracle(family.build(), family, rule, STEPS))


@families
def test_alternating_calls_with_the_unconditional_first_equal_the_oracle(family):
    rule = Rule(
        enable_separate_cfg=True,
        cfg_compute_first=True,
        cfg_diff_compute_separate=False,
        residual_diff_threshold=0.12,
    )
    model = family.build()
    mine = run_dbcache(model, family, rule, STEPS)
    assert [lane.branch for lane in summary(model).lanes] == ["uncond", "cond"]
    assert_same(mine, run_oracle(family.build(), family, rule, STEPS))


@families
@pytest.mark.parametrize("case", GUIDED)
def test_named_calls_equal_the_oracle(family, case):
    rule = GUIDED[case]
    how = {"branches": BRANCHES, "named": True}
    model = family.build()
    mine = run_dbcache(model, family, rule, STEPS, **how)
    assert [lane.branch for lane in summary(model).lanes] == list(BRANCHES)
    assert_same(mine, run_oracle(family.build(), family, rule, STEPS, **how))


@families
def test_names_win_over_parity(family):
    rule = Rule(enable_separate_cfg=True, residual_diff_threshold=0.12)
    how = {"branches": BRANCHES[::-1], "named": True}
    mine = run_dbcache(family.build(), family, rule, STEPS, **how)
    assert_same(mine, run_oracle(family.build(), family, rule, STEPS, **how))


@families
@pytest.mark.parametrize("guided", [False, True], ids=["one branch", "two branches"])
def test_step_count_starts_the_next_request_before_its_first_step(family, guided):
    rule = Rule(
        num_inference_steps=12,
        enable_separate_cfg=guided,
        residual_diff_threshold=0.2,
        max_cached_steps=4,
        order=1,
    )
    mine, theirs = family.build(), family.build()
    run_dbcache(mine, family, rule, 12)
    branches = BRANCHES if guided else ("cond",)
    with Oracle(theirs, family.lists, family.encoder_first, rule) as oracle:
        denoise(theirs, family, 12, branches=branches)
        for seed in (6, 7):
            outputs = denoise(mine, family, 12, branches=branches, seed=seed)
            expected = denoise(theirs, family, 12, branches=branches, seed=seed)
            torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
            cached = [lane.cached_steps for lane in dbcache_lanes(mine)]
            assert cached == [trace.cached_steps for trace in oracle.lanes.values()]


@families
def test_refresh_context_starts_the_next_request(family):
    rule = Rule(residual_diff_threshold=0.2, order=1, enable_separate_cfg=False)
    mine, theirs = family.build(), family.build()
    run_dbcache(mine, family, rule, 9)
    with Oracle(theirs, family.lists, family.encoder_first, rule) as oracle:
        denoise(theirs, family, 9)
        for seed, steps in ((6, 14), (7, 10)):
            refresh_context(mine, num_inference_steps=steps)
            oracle.new_request()
            outputs = denoise(mine, family, steps, seed=seed)
            expected = denoise(theirs, family, steps, seed=seed)
            torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
            assert dbcache_lanes(mine)[0].cached_steps == oracle.lanes[None].cached_steps


PIPELINE_CASES = {
    "F1B0": Rule(residual_diff_threshold=0.12),
    "F2B1 order 1": Rule(
        Fn_compute_blocks=2, Bn_compute_blocks=1, residual_diff_threshold=0.2, order=1
    ),
    "2 in a row, order 2": Rule(
        max_continuous_cached_steps=2, residual_diff_threshold=0.3, order=2, max_warmup_steps=5
    ),
}


@pipelines
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "true cfg"])
@pytest.mark.parametrize("case", PIPELINE_CASES)
def test_pipeline_equals_the_oracle(name, guided, case):
    rule, family = PIPELINE_CASES[case], FAMILIES[name]
    mine = run_dbcache(pipeline(name), family, rule, STEPS, guided=guided)
    expected = run_oracle(pipeline(name), family, rule, STEPS, guided=guided)
    assert len(expected.lanes) == 1 + guided
    assert any(lane.cached_steps for lane in expected.lanes)
    assert_same(mine, expected)


@pipelines
def test_each_pipeline_call_is_a_new_request(name):
    rule, family = PIPELINE_CASES["F2B1 order 1"], FAMILIES[name]
    pipe = pipeline(name)
    run_dbcache(pipe, family, rule, 13)
    for seed, steps, guided in ((6, STEPS, True), (7, 16, False)):
        outputs = generate(pipe, steps, seed=seed, guided=guided)
        expected = run_oracle(pipeline(name), family, rule, steps, seed=seed, guided=guided)
        torch.testing.assert_close(outputs, expected.outputs, rtol=1e-5, atol=1e-5)
        cached = [lane.cached_steps for lane in dbcache_lanes(pipe)]
        assert cached == [lane.cached_steps for lane in expected.lanes]


@pytest.mark.parametrize("case", PIPELINE_CASES)
def test_two_transformers_of_one_pipeline_equal_the_oracle(case):
    rule = PIPELINE_CASES[case]
    mine = run_dbcache(pipeline("wan2.2"), FAMILIES["wan"], rule, 32)
    expected = run_oracle(pipeline("wan2.2"), FAMILIES["wan"], rule, 32)
    assert len(expected.lanes) == 4
    assert all(lane.cached_steps for lane in expected.lanes)
    assert_same(mine, expected)


def test_a_modifier_per_transformer_equals_the_oracle():
    base = Rule(residual_diff_threshold=0.12)
    rules = [
        replace(base, residual_diff_threshold=0.3, max_continuous_cached_steps=2),
        replace(base, max_warmup_steps=2, Bn_compute_blocks=2),
    ]
    changes = [
        {"residual_diff_threshold": 0.3, "max_continuous_cached_steps": 2},
        {"max_warmup_steps": 2, "Bn_compute_blocks": 2},
    ]
    pipe, other = pipeline("wan2.2"), pipeline("wan2.2")
    enable(
        pipe,
        cache_config=DBCacheConfig(**options(base)),
        params_modifiers=[ParamsModifier(cache_config=DBCacheConfig(**c)) for c in changes],
    )
    outputs = generate(pipe, 32)
    with (
        Oracle(other.transformer, ("blocks",), None, rules[0]) as high,
        Oracle(other.transformer_2, ("blocks",), None, rules[1]) as low,
    ):
        expected = generate(other, 32)
    traces = [*high.lanes.values(), *low.lanes.values()]
    assert [lane.reasons for lane in dbcache_lanes(pipe)] == [trace.reasons for trace in traces]
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


@pipelines
def test_two_pipelines_of_one_class_do_not_see_each_other(name):
    rules = list(PIPELINE_CASES.values())
    first, second = pipeline(name), pipeline(name)
    second.__class__ = type(first)
    plain = generate(second, 16)
    family = FAMILIES[name]
    alone = run_dbcache(first, family, rules[0], 16)
    run_dbcache(second, family, rules[1], 16)
    assert all(map(torch.equal, generate(first, 16), alone.outputs))
    disable(first)
    expected = run_oracle(pipeline(name), family, rules[1], 16)
    assert_same(Run(generate(second, 16), dbcache_lanes(second)), expected)
    disable(second)
    assert all(map(torch.equal, generate(second, 16), plain))


@families
def test_a_batch_takes_one_decision_over_all_its_samples(family):
    rule = Rule(residual_diff_threshold=0.12, order=1, enable_separate_cfg=False)
    mine = run_dbcache(family.build(), family, rule, STEPS, batch=3)
    assert_same(mine, run_oracle(family.build(), family, rule, STEPS, batch=3))


@torch.no_grad()
def drift(model, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Run FLUX once per (image tokens, text tokens) on inputs that change slowly."""
    outputs = []
    for step, (image, text) in enumerate(sizes):
        x = noise(1, 24, 16, seed=5) + 0.06 * step * noise(1, 24, 16, seed=6)
        arguments = FAMILIES["flux"].arguments(x[:, :image], 1 - step / len(sizes), "cond")
        embeds = arguments["encoder_hidden_states"]
        arguments["encoder_hidden_states"] = torch.cat([embeds, embeds], 1)[:, :text]
        arguments["txt_ids"] = torch.zeros(text, 3)
        outputs.append(model(**arguments)[0])
    return outputs


SIZES = {
    "image": [(16, 6)] * 8 + [(12, 6)] * 8 + [(16, 6)] * 4,
    "text": [(16, 6)] * 8 + [(16, 9)] * 8 + [(16, 6)] * 4,
    "both, one step": [(16, 6)] * 8 + [(12, 9)] + [(16, 6)] * 8,
    "both, in the warm-up": [(16, 6)] * 2 + [(12, 9)] * 10,
}


@pytest.mark.parametrize("what", SIZES)
@pytest.mark.parametrize(
    "rule",
    [
        Rule(residual_diff_threshold=0.3),
        Rule(residual_diff_threshold=0.3, order=2, Fn_compute_blocks=2, Bn_compute_blocks=1),
        Rule(residual_diff_threshold=1.0, order=1),
        Rule(steps_computation_mask=(1,) * 4 + (0,) * 20, steps_computation_policy="static"),
    ],
    ids=["reuse", "order 2", "always", "static"],
)
def test_a_change_of_shape_is_a_full_step_that_starts_the_history_again(what, rule):
    family, mine, theirs = FAMILIES["flux"], flux(), flux()
    run_dbcache(mine, family, rule, 0)
    outputs = drift(mine, SIZES[what])
    with Oracle(theirs, family.lists, True, rule) as oracle:
        expected = drift(theirs, SIZES[what])
    assert dbcache_lanes(mine)[0].reasons == oracle.lanes[None].reasons
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.1, 1.0])
def test_a_probe_without_residual_is_never_cached_and_says_so(threshold):
    family, mine, theirs = FAMILIES["flux"], flux(), flux()
    for model in (mine, theirs):
        torch.nn.init.zeros_(model.transformer_blocks[0].norm1.linear.weight)
        torch.nn.init.zeros_(model.transformer_blocks[0].norm1.linear.bias)
    rule = Rule(residual_diff_threshold=threshold)
    run = run_dbcache(mine, family, rule, 8)
    assert run.lanes[0].reasons == ["warm-up"] * 4 + ["NaN diff"] * 4
    assert all(map(torch.equal, run.outputs, denoise(theirs, family, 8)))


@families
def test_bfloat16_takes_the_same_decisions_from_a_float32_diff(family):
    rule = Rule(residual_diff_threshold=0.1, enable_separate_cfg=False)
    mine = run_dbcache(family.build().bfloat16(), family, rule, STEPS)
    expected = run_oracle(family.build().bfloat16(), family, rule, STEPS)
    (lane,), (reference,) = mine.lanes, expected.lanes
    # up to the first cached step nothing but the stored reference was rounded to bfloat16
    first = min(reference.diffs)
    assert lane.diffs[first] == pytest.approx(reference.diffs[first], rel=3e-3)
    # later the closed loop carries the rounding of the stored block residual
    assert lane.diffs == pytest.approx(reference.diffs, rel=0.04)
    assert lane.reasons == reference.reasons
    for output, target in zip(mine.outputs, expected.outputs, strict=True):
        assert (output - target).abs().max() <= 0.03 * target.abs().max()
