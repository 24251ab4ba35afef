"""What cache-dit 1.5.3 gets wrong is right here: one test per defect that has to do with decisions.

POINTERS names the tests, here or elsewhere, that fail on each defect; a test holds it to the files.
"""

import ast
from pathlib import Path

import pytest
import tiny
import torch
from engines import run_dbcache
from oracle import Rule

import dbcache
from dbcache import (
    BlockAdapter,
    DBCacheConfig,
    ForwardPattern,
    ParamsModifier,
    TaylorSeerCalibratorConfig,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).resolve().parents[1]
HERE = "core/test_defects_of_decisions.py"
ORACLE = "core/test_oracle_equality.py"
PRUNE = "adapters/test_dbprune.py"

POINTERS = {
    "a bare transformer's next request begins one call late": [
        f"{ORACLE}::test_step_count_starts_the_next_request_before_its_first_step",
        "adapters/test_requests.py::test_transformer_starts_anew_after_its_steps_not_one_call_later",
    ],
    "the guidance branches swap roles from the second request on": [
        "adapters/test_requests.py::test_branches_keep_their_roles_over_requests",
    ],
    "DBPrune crashes on patterns 3, 4 and 5": [
        "adapters/test_dbprune_patterns.py::test_every_pattern_equals_the_oracle"
    ],
    "DBPrune: stacks of one length share the blocks that always run": [
        f"{PRUNE}::test_two_stacks_with_options_of_their_own",
    ],
    "DBPrune waits for every block": [f"{PRUNE}::test_the_host_waits_once_per_undecided_step"],
    "DBPrune: only one block is pruned on the step that reaches the limit": [
        f"{PRUNE}::test_equals_the_oracle",
        f"{HERE}::test_the_step_that_reaches_the_limit_prunes_all_its_blocks",
    ],
    "Fn + Bn beyond the stack runs blocks twice": [
        f"{HERE}::test_no_block_runs_twice_where_fn_and_bn_overlap",
        "adapters/test_guards.py::test_too_many_blocks_are_clamped_with_a_warning_that_says_what_runs",
    ],
    "the default F8 fails on a shorter list of blocks": [
        f"{HERE}::test_the_default_runs_on_a_list_of_three_blocks",
    ],
    "patterns 4 and 5 lose the encoder states where Fn is the whole stack": [
        f"{HERE}::test_encoder_states_survive_a_probe_of_the_whole_stack",
    ],
    "Bn blocks that take what middle blocks make compute nonsense": [
        "adapters/test_models.py::test_long_skips_refuse_more_last_blocks_than_first_ones",
    ],
    "ControlNet residuals are added once, after the stack": [
        "adapters/test_flux_pipelines.py"
        "::test_controlnet_residuals_are_right_on_full_and_on_cached_steps",
        "adapters/test_added_residuals.py"
        "::test_controlnet_residuals_are_right_on_full_and_on_cached_steps",
    ],
    "cached hidden states replace the encoder states by their residual": [
        f"{HERE}::test_cached_hidden_states_do_not_touch_the_encoder_states",
    ],
    "TaylorSeer is inert before the fourth full step": [
        f"{HERE}::test_exact_taylorseer_predicts_from_the_second_full_step_on",
    ],
    "TaylorSeer is biased from order 2 on": [
        "kernels/test_taylor.py::test_newton_weights_are_lagranges_and_exact_on_polynomials",
    ],
    "the accumulated diff latches off for the rest of the request": [
        f"{HERE}::test_the_accumulated_diff_starts_again_after_a_full_step",
        "core/test_golden_traces.py::test_each_step_has_its_reason",
    ],
    "a limit of consecutive steps is exceeded": [
        "core/test_golden_traces.py::test_each_step_has_its_reason"
    ],
    "the diff is a number in bfloat16": [
        f"{ORACLE}::test_bfloat16_takes_the_same_decisions_from_a_float32_diff",
    ],
    "one decision for the batch, whatever its worst sample": [
        f"{ORACLE}::test_the_worst_sample_of_a_batch_decides_if_asked_to",
    ],
    "a diff of 0 / 0 with a threshold of 1 is cached": [
        f"{ORACLE}::test_a_probe_without_residual_is_never_cached_and_says_so",
    ],
    "two pipelines of one class share what was patched": [
        f"{ORACLE}::test_two_pipelines_of_one_class_do_not_see_each_other",
        "adapters/test_requests.py::test_two_pipelines_of_one_class_do_not_touch_each_other",
    ],
    "a second enable is ignored": [
        "adapters/test_requests.py::test_enabling_twice_sets_anew_and_disabling_twice_is_fine",
    ],
    "the config that was passed in is changed": [
        "adapters/test_requests.py::test_enable_does_not_change_the_config_object",
    ],
    "branches go by the class of the pipeline, not by its calls": [
        f"{ORACLE}::test_names_win_over_parity",
        "adapters/test_requests.py::test_guidance_switched_on_and_off_between_calls",
    ],
    "cfg_compute_first needs a shared diff": [
        f"{HERE}::test_the_unconditional_branch_may_come_first_with_a_diff_of_its_own",
    ],
    "the shared diff needs the conditional branch first": [
        f"{ORACLE}::test_alternating_calls_with_the_unconditional_first_equal_the_oracle",
    ],
    "a misspelt option does nothing": [
        f"{HERE}::test_the_misspelt_option_of_the_guide_is_an_error",
        "core/test_load_configs.py::test_refuses_what_it_does_not_know",
    ],
    "a modifier with a predictor alone is ignored": [
        f"{HERE}::test_a_modifier_with_a_predictor_alone_counts",
        "core/test_config.py::test_modifier_with_a_calibrator_alone_counts",
    ],
    "a modifier that was not reset forces every default": [
        f"{HERE}::test_a_modifier_changes_only_what_it_was_given",
    ],
    "a static mask that begins with 0 fails at the first step": [
        "core/test_config.py::test_rejects_masks_that_cannot_be_run",
    ],
    "no masks for 5 or 7 steps, nor for fewer than 4": [
        "core/test_steps_mask.py::test_short_requests_begin_and_end_with_full_steps",
    ],
    "after a forced refresh the hint counts calls of another period": [
        "adapters/test_requests.py::test_forced_refresh_counts_calls",
    ],
    "-1 and 0 have the same short name": [
        f"{HERE}::test_no_limit_and_no_step_have_names_of_their_own"
    ],
    "the summary has an entry per module and sentinels among the diffs": [
        f"{HERE}::test_the_summary_holds_only_what_was_measured",
    ],
    "a cache that never hits is not said": [
        "core/test_summary.py::test_warns_of_a_cache_that_never_hits",
    ],
    "an unknown cache type is none, silently": [f"{HERE}::test_an_unknown_cache_type_is_an_error"],
}


@pytest.mark.parametrize("defect", POINTERS)
def test_each_defect_has_tests_that_exist(defect):
    for pointer in POINTERS[defect]:
        path, _, name = pointer.partition("::")
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert name in names, pointer


ALWAYS = {"max_warmup_steps": 2, "residual_diff_threshold": 1.0}


def cached(model):
    return [lane.cached_steps for lane in dbcache.summary(model).lanes]


def test_the_step_that_reaches_the_limit_prunes_all_its_blocks():
    family = tiny.FAMILIES["flux"]
    config = dbcache.DBPruneConfig(Fn_compute_blocks=1, max_cached_steps=2, **ALWAYS)
    model = dbcache.enable(family.build(), config)
    tiny.denoise(model, family, 6)
    assert dbcache.summary(model).lanes[0].pruned_blocks == [0, 0, 9, 9, 0, 0]


def counted(model, blocks):
    calls = [0] * len(blocks)

    def count(i):
        calls[i] += 1

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: count(i))
    return calls


@pytest.mark.parametrize(("fn", "bn"), [(8, 8), (6, 4), (5, 3), (8, 1)])
def test_no_block_runs_twice_where_fn_and_bn_overlap(fn, bn):
    family = tiny.FAMILIES["qwen"]
    plain = tiny.denoise(family.build(), family, 4)
    model = family.build()
    with pytest.warns(UserWarning, match="leaves none"):
        dbcache.enable(model, Fn_compute_blocks=fn, Bn_compute_blocks=bn, **ALWAYS)
    calls = counted(model, model.transformer_blocks)
    assert all(map(torch.equal, tiny.denoise(model, family, 4), plain))
    assert calls == [4] * 8


def test_the_default_runs_on_a_list_of_three_blocks():
    family = tiny.FAMILIES["wan"]
    plain = tiny.denoise(family.build(layers=3), family, 3)
    model = family.build(layers=3)
    with pytest.warns(UserWarning, match="leaves none"):
        dbcache.enable(model)
    assert all(map(torch.equal, tiny.denoise(model, family, 3), plain))


class EncoderMaker(torch.nn.Module):
    """A model whose blocks take hidden states and return encoder states, too."""

    class Block(torch.nn.Module):
        def __init__(self, pattern, seed):
            super().__init__()
            self.pattern = pattern
            self.scale = 0.1 * (seed + 1)

        def forward(self, hidden_states):
            hidden = hidden_states + self.scale * torch.tanh(hidden_states)
            streams = {"hidden_states": hidden, "encoder_hidden_states": 3 * hidden[:, :2] + 1}
            return tuple(streams[name] for name in self.pattern.returns)

    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern
        self.blocks = torch.nn.ModuleList([self.Block(pattern, seed) for seed in range(5)])

    def forward(self, x):
        for block in self.blocks:
            streams = dict(zip(self.pattern.returns, block(x), strict=True))
            x = streams["hidden_states"]
        return x, streams["encoder_hidden_states"]


makers = pytest.mark.parametrize(
    "pattern", [ForwardPattern.Pattern_4, ForwardPattern.Pattern_5], ids=lambda p: p.name
)


def enabled(model, calibrator=None, **options):
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)
    dbcache.enable(adapter, DBCacheConfig(**options), calibrator)
    return model


def drifting(step):
    x = tiny.noise(1, 4, 6, seed=1)
    return x + 0.02 * step * tiny.noise(1, 4, 6, seed=2)


@makers
def test_encoder_states_survive_a_probe_of_the_whole_stack(pattern):
    plain = EncoderMaker(pattern)(drifting(0))
    with pytest.warns(UserWarning, match="leaves none"):
        model = enabled(EncoderMaker(pattern), Fn_compute_blocks=5, **ALWAYS)
    for _ in range(4):
        assert all(map(torch.equal, model(drifting(0)), plain))


@makers
@pytest.mark.parametrize("order", [0, 1])
def test_cached_hidden_states_do_not_touch_the_encoder_states(pattern, order):
    calibrator = TaylorSeerCalibratorConfig(
        taylorseer_order=order, calibrator_cache_type="hidden_states"
    )
    model = enabled(EncoderMaker(pattern), calibrator, Fn_compute_blocks=1, **ALWAYS)
    plain = EncoderMaker(pattern)
    for step in range(5):
        for output, wanted in zip(model(drifting(step)), plain(drifting(step)), strict=True):
            assert (output - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert cached(model) == [[2, 3, 4]]


def test_exact_taylorseer_predicts_from_the_second_full_step_on():
    """Linear data: exact from the first cached step on, after two full ones."""
    model = enabled(
        EncoderMaker(ForwardPattern.Pattern_4),
        TaylorSeerCalibratorConfig(taylorseer_order=1, exact=True),
        Fn_compute_blocks=1,
        **ALWAYS,
    )
    for block in model.blocks:  # residuals that are linear in the input, and so in the step
        block.forward = lambda h, b=block: (h * (1 + b.scale), h[:, :2] * 3)
    for step in range(5):
        expected = drifting(step)
        for block in model.blocks:
            expected = expected * (1 + block.scale)
        torch.testing.assert_close(model(drifting(step))[0], expected, rtol=1e-5, atol=1e-6)
    assert cached(model) == [[2, 3, 4]]


def test_the_accumulated_diff_starts_again_after_a_full_step():
    family = tiny.FAMILIES["flux"]
    rule = Rule(
        max_accumulated_residual_diff_threshold=0.15,
        residual_diff_threshold=0.5,
        max_warmup_steps=2,
        enable_separate_cfg=False,
    )
    (lane,) = run_dbcache(family.build(), family, rule, 20).lanes
    first = lane.reasons.index("accumulated limit")
    assert any(step > first for step in lane.cached_steps)
    assert lane.reasons.count("accumulated limit") > 1


def test_the_unconditional_branch_may_come_first_with_a_diff_of_its_own():
    family = tiny.FAMILIES["wan"]
    model = dbcache.enable(
        family.build(),
        Fn_compute_blocks=1,
        enable_separate_cfg=True,
        cfg_compute_first=True,
        cfg_diff_compute_separate=True,
        **ALWAYS,
    )
    tiny.denoise(model, family, 4, branches=tiny.BRANCHES[::-1])
    lanes = dbcache.summary(model).lanes
    assert [(lane.branch, lane.cached_steps) for lane in lanes] == [
        ("uncond", [2, 3]),
        ("cond", [2, 3]),
    ]
    assert lanes[0].diffs != lanes[1].diffs


def test_the_misspelt_option_of_the_guide_is_an_error():
    for take in (lambda given: dbcache.load_configs({"cache_config": given}), dbcache.load_configs):
        with pytest.raises(TypeError, match="enable_separate_cfg"):
            take({"enable_sperate_cfg": True})
    with pytest.raises(TypeError, match="enable_separate_cfg"):
        DBCacheConfig(enable_sperate_cfg=True)


def two_transformers(modifiers):
    pipe = tiny.pipeline("wan2.2")
    dbcache.enable(pipe, DBCacheConfig(Fn_compute_blocks=1, **ALWAYS), params_modifiers=modifiers)
    return pipe, tiny.generate(pipe, 16, guided=False)


def test_a_modifier_with_a_predictor_alone_counts():
    predictor = ParamsModifier(calibrator_config=TaylorSeerCalibratorConfig(exact=True))
    _, plain = two_transformers(None)
    pipe, second = two_transformers([ParamsModifier(), predictor])
    _, both = two_transformers(predictor)
    first, _ = dbcache.summary(pipe).lanes
    # the first transformer's steps are those without the predictor, the last ones are not
    assert all(map(torch.equal, second[: first.steps], plain[: first.steps]))
    assert not torch.equal(second[-1], plain[-1])
    assert not torch.equal(second[-1], both[-1])


def test_a_modifier_changes_only_what_it_was_given():
    modifier = ParamsModifier(cache_config=DBCacheConfig(max_warmup_steps=4))
    pipe, _ = two_transformers([modifier, ParamsModifier()])
    first, second = dbcache.summary(pipe).lanes
    assert first.threshold == second.threshold == 1.0
    assert first.cached_steps == list(range(4, first.steps))
    assert second.cached_steps == list(range(2, second.steps))


def test_no_limit_and_no_step_have_names_of_their_own():
    for name in ("max_cached_steps", "max_continuous_cached_steps"):
        none, never = (DBCacheConfig(**{name: limit}).strify() for limit in (-1, 0))
        assert none != never


def test_the_summary_holds_only_what_was_measured():
    family = tiny.FAMILIES["flux"]
    model = dbcache.enable(family.build(), Fn_compute_blocks=1, max_warmup_steps=3)
    tiny.denoise(model, family, 8)
    (lane,) = dbcache.summary(model)
    assert set(lane.diffs) == {3, 4, 5, 6, 7}
    assert all(diff > 0 for diff in lane.diffs.values())


def test_an_unknown_cache_type_is_an_error():
    for take in (dbcache.cache_type, lambda name: dbcache.load_configs({"cache_type": name})):
        with pytest.raises(ValueError, match="DBPrune"):
            take("DBCash")
