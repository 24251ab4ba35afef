"""DBPrune does on real, tiny models what an independent oracle does: the same blocks, on the same
steps, for the same reasons, with the same outputs."""

from dataclasses import replace

import pytest
import tiny
import torch
from cases import on_families
from prune_oracle import PruneRule
from prune_runs import ENCODER, HIDDEN, STEPS, assert_same, blocks_of, counted, options, oracle_of
from tiny import BRANCHES, FAMILIES, denoise

import dbcache
from dbcache import BlockAdapter, DBPruneConfig, ForwardPattern
from dbcache.kernels.pruning.block_state import THRESHOLD
from dbcache.lanes.block_store import BlockStore

pytestmark = pytest.mark.usefixtures("one_thread")

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def compare(family, rule, steps=STEPS, **how):
    """Run both on fresh copies; return the oracle."""
    mine, theirs = family.build(), family.build()
    if rule.enable_separate_cfg:
        how = {"branches": BRANCHES} | how
    dbcache.enable(mine, DBPruneConfig(**options(rule)))
    calls, stop = counted(blocks_of(mine, family))
    outputs = denoise(mine, family, steps, **how)
    stop()
    with oracle_of(theirs, family, rule)() as oracle:
        expected = denoise(theirs, family, steps, **how)
    assert_same(dbcache.summary(mine).lanes, oracle)
    assert calls == oracle.block_calls
    for output, wanted in zip(outputs, expected, strict=True):
        assert (output - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    return oracle


MASK = (1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1)


RULES = {
    "F1B0": PruneRule(),
    "low": PruneRule(residual_diff_threshold=0.055),
    "high": PruneRule(residual_diff_threshold=0.2),
    "F2B2": PruneRule(Fn_compute_blocks=2, Bn_compute_blocks=2, residual_diff_threshold=0.1),
    "some never": PruneRule(non_prune_block_ids=(3, 5, 60), residual_diff_threshold=0.1),
    "the first ones never": PruneRule(non_prune_block_ids=(1, 2, 4, 7)),
    "dynamic": PruneRule(enable_dynamic_prune_threshold=True),
    "dynamic, highest given": PruneRule(
        residual_diff_threshold=0.06,
        enable_dynamic_prune_threshold=True,
        max_dynamic_prune_threshold=0.3,
        dynamic_prune_threshold_relax_ratio=1.1,
    ),
    "interval 3": PruneRule(residual_cache_update_interval=3, residual_diff_threshold=0.11),
    "at most 4": PruneRule(max_cached_steps=4, residual_diff_threshold=0.15),
    "2 in a row": PruneRule(max_continuous_cached_steps=2, residual_diff_threshold=0.3),
    "always": PruneRule(residual_diff_threshold=1.0, max_continuous_cached_steps=3),
    "no warm-up": PruneRule(max_warmup_steps=0, residual_diff_threshold=0.1),
    "warm-up interval": PruneRule(max_warmup_steps=7, warmup_interval=2),
    "mask": PruneRule(steps_computation_mask=MASK, residual_diff_threshold=0.12),
    "mask, static": PruneRule(steps_computation_mask=MASK, steps_computation_policy="static"),
}


@pytest.mark.parametrize(("case", "name"), on_families(RULES))
def test_equals_the_oracle(case, name):
    oracle = compare(FAMILIES[name], RULES[case])
    assert any(step for lane in oracle.lanes.values() for step in lane.skipped)


@families
@pytest.mark.parametrize("separate", [True, False], ids=["own diff", "shared diff"])
def test_two_branches_have_lanes_of_their_own(family, separate):
    rule = PruneRule(
        enable_separate_cfg=True,
        cfg_diff_compute_separate=separate,
        residual_diff_threshold=0.09,
        max_continuous_cached_steps=3,
    )
    oracle = compare(family, rule)
    assert list(oracle.lanes) == ["cond", "uncond"]


def test_single_blocks_are_left_out_and_others_run_on_the_same_step():
    """What sets it apart from a decision per step."""
    oracle = compare(FAMILIES["wan"], PruneRule(residual_diff_threshold=0.11))
    counts = {len(step) for step in oracle.lanes[None].skipped}
    assert counts - {0, len(oracle.prunable)}


@families
def test_a_batch_decides_as_a_whole_or_by_its_worst_sample(family):
    whole, worst = (
        compare(family, PruneRule(batch_reduce=how, residual_diff_threshold=0.12), batch=3)
        for how in ("mean", "max")
    )
    assert whole.lanes[None].skipped != worst.lanes[None].skipped


@families
@pytest.mark.parametrize("threshold", [0.055, 0.1, 0.15])
def test_the_estimate_is_exact_up_to_the_first_block_that_runs_and_near_behind_it(
    family, threshold
):
    """Compared with the change of each block's real input, which cache-dit waits for."""
    model, alike = family.build(), []
    rule = PruneRule(residual_diff_threshold=threshold)
    with oracle_of(model, family, rule)() as oracle:
        denoise(model, family, STEPS)
    lane = oracle.lanes[None]
    for skipped, diffs, real in zip(lane.skipped, lane.diffs, lane.real, strict=True):
        runs = False
        for i, diff in diffs.items():
            if not runs:
                assert diff == pytest.approx(real[i], rel=1e-4)
            runs |= i not in skipped
            alike.append((real[i] < threshold) == (diff < threshold))
    assert sum(alike) >= 0.88 * len(alike) > 100


@pytest.mark.parametrize("rule", [RULES["F1B0"], RULES["2 in a row"], RULES["mask, static"]])
def test_the_host_waits_once_per_undecided_step(rule, monkeypatch):
    reads = []
    plain = BlockStore.read
    monkeypatch.setattr(BlockStore, "read", lambda self, x: reads.append(0) or plain(self, x))
    family = FAMILIES["flux"]
    model = dbcache.enable(family.build(), DBPruneConfig(**options(rule)))
    denoise(model, family, STEPS)
    (lane,) = dbcache.summary(model).lanes
    undecided = ("below threshold", "above threshold")
    assert len(reads) == sum(reason in undecided for reason in lane.reasons)
    assert len(reads) < STEPS


@families
def test_threshold_0_is_bit_identical_and_disable_leaves_no_trace(family):
    model = family.build()
    plain = denoise(model, family, 20)
    before = {n: (type(m), dict(vars(m))) for n, m in model.named_modules()}
    for threshold in (0.0, 0.2):
        dbcache.enable(model, DBPruneConfig(Fn_compute_blocks=1, residual_diff_threshold=threshold))
        outputs = denoise(model, family, 20)
        same = all(map(torch.equal, outputs, plain))
        assert same == (threshold == 0.0)
        dbcache.disable(model)
    assert {n: (type(m), dict(vars(m))) for n, m in model.named_modules()} == before
    assert all(map(torch.equal, denoise(model, family, 20), plain))


@families
def test_memory_is_two_hidden_and_one_encoder_tensor_per_block(family):
    model = family.build()
    rule = PruneRule(Fn_compute_blocks=2, Bn_compute_blocks=1, non_prune_block_ids=(2, 4))
    dbcache.enable(model, DBPruneConfig(**options(rule)))
    blocks, sizes = blocks_of(model, family), {}

    def note(_module, args, kwargs):
        named = dict(zip((HIDDEN, ENCODER), args, strict=False)) | kwargs
        sizes.update({name: named[name].nbytes for name in (HIDDEN, ENCODER)})

    hook = blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    denoise(model, family, 6)
    hook.remove()
    stored = len(blocks) - 2 - 1 - 1  # block 2 is before the first that may be left out, 4 is not
    encoder = sizes[ENCODER] if family.encoder_first is not None else 0
    (lane,) = dbcache.summary(model).lanes
    assert lane.megabytes * 1e6 == pytest.approx(stored * (2 * sizes[HIDDEN] + encoder))


def test_a_pipeline_call_is_a_request():
    pipe = tiny.pipeline("flux")
    dbcache.enable(
        pipe, DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.15)
    )
    first = tiny.generate(pipe, 16, guided=True)
    traces = [lane.pruned for lane in dbcache.summary(pipe).lanes]
    assert len(traces) == 2
    assert all(map(any, traces))
    assert all(map(torch.equal, tiny.generate(pipe, 16, guided=True), first))
    assert [lane.pruned for lane in dbcache.summary(pipe).lanes] == traces


def test_the_summary_tells_the_share_of_blocks_left_out():
    family = FAMILIES["flux"]
    model = dbcache.enable(family.build(), DBPruneConfig(**options(RULES["F1B0"])))
    denoise(model, family, STEPS)
    summary = dbcache.summary(model)
    (lane,) = summary.lanes
    assert lane.blocks == 10
    assert lane.pruned_blocks == [len(step) for step in lane.pruned]
    assert lane.pruned_ratio == sum(lane.pruned_blocks) / (10 * STEPS)
    assert f"{lane.pruned_ratio:.0%}" in str(summary)
    assert lane.to_dict()["pruned_ratio"] == lane.pruned_ratio


def test_two_stacks_with_options_of_their_own():
    """Blocks that always run are those of the stack itself (cache-dit mixes equally long ones)."""
    model = FAMILIES["flux"].build(double=5, single=5)
    adapter = BlockAdapter(
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=ForwardPattern.Pattern_1,
        params_modifiers=[
            dbcache.ParamsModifier(cache_config=DBPruneConfig(Fn_compute_blocks=4)),
            dbcache.ParamsModifier(cache_config=DBPruneConfig(non_prune_block_ids=[2])),
        ],
    )
    base = PruneRule(residual_diff_threshold=1.0, max_warmup_steps=2)
    dbcache.enable(adapter, DBPruneConfig(**options(base)))
    denoise(model, FAMILIES["flux"], 4)
    first, second = dbcache.summary(model).lanes
    assert first.pruned == [[], [], [4], [4]]
    assert second.pruned == [[], [], [1, 3, 4], [1, 3, 4]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"non_prune_block_ids": [-1]}, "at least 0"),
        ({"non_prune_block_ids": "16"}, "list of block numbers"),
        ({"residual_cache_update_interval": 0}, ">= 1"),
        ({"dynamic_prune_threshold_relax_ratio": 0}, "> 0"),
        ({"max_dynamic_prune_threshold": -1.0}, "> 0"),
        ({"max_cached_steps": 3, "max_pruned_steps": 4}, "must not differ"),
        ({"cache_dtype": "fp8"}, "no meaning here"),
        ({"max_accumulated_residual_diff_threshold": 0.5}, "no meaning here"),
        ({"cache_type": "DBCache"}, "DBPrune"),
    ],
    ids=str,
)
def test_bad_options_are_errors(changes, says):
    with pytest.raises((ValueError, TypeError), match=says):
        DBPruneConfig(**changes)


def test_a_misspelt_option_is_an_error_that_names_the_right_one():
    with pytest.raises(TypeError, match="non_prune_block_ids"):
        DBPruneConfig(non_prune_blocks_ids=[1])


def test_a_predictor_is_refused_before_anything_is_changed():
    model = FAMILIES["wan"].build()
    with pytest.raises(ValueError, match="leave the calibrator out"):
        dbcache.enable(model, DBPruneConfig(), dbcache.TaylorSeerCalibratorConfig())
    assert "_dbcache" not in vars(model)
    assert "forward" not in vars(model)


def test_no_block_to_leave_out_is_said_and_runs_all():
    family = FAMILIES["wan"]
    model = family.build()
    with pytest.warns(UserWarning, match="non_prune_block_ids"):
        dbcache.enable(model, DBPruneConfig(Fn_compute_blocks=6, non_prune_block_ids=[6, 7]))
    plain = family.build()
    assert all(map(torch.equal, denoise(model, family, 3), denoise(plain, family, 3)))
    with pytest.warns(UserWarning, match="leaves none"):
        dbcache.enable(model, DBPruneConfig(Fn_compute_blocks=8))


def test_both_names_of_the_limit_mean_the_same():
    rule = replace(RULES["at most 4"], max_cached_steps=-1)
    family, pruned = FAMILIES["flux"], []
    for limit in ({"max_pruned_steps": 4}, {"max_cached_steps": 4}):
        model = dbcache.enable(family.build(), DBPruneConfig(**options(rule) | limit))
        denoise(model, family, STEPS)
        pruned.append(dbcache.summary(model).lanes[0].pruned)
    assert pruned[0] == pruned[1]
    assert sum(map(bool, pruned[0])) == 4


class Vote:
    """Stands for ranks that each have a part of the tokens: notes a message, or answers it."""

    def __init__(self, answer=None):
        self.answer, self.message = answer, None

    def vote(self, sums, *, per_sample):
        assert per_sample
        self.message = sums.clone()
        return sums if self.answer is None else self.answer


def test_ranks_that_share_the_tokens_decide_as_one_that_has_them_all():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 8, generator=generator)
    drift = 0.08 * torch.randn(3, 2, 6, 8, generator=generator)
    caches = [BlockStore([True, False, True], x.device) for _ in range(3)]
    for cache in caches:
        cache.rule[THRESHOLD] = 0.1
    parts = [slice(None), slice(0, 2), slice(2, 6)]
    for step in range(2):
        due = torch.tensor([1, 1 + step, step], dtype=torch.int32)
        for cache, part in zip(caches, parts, strict=True):
            h = x[:, part] + step * drift[0][:, part]
            for block in range(3):
                out = h + (block + 1) * torch.tanh(h) + step * drift[block][:, part]
                cache.store(block, due, (h, None), (out, None))
                h = out
    now = [x[:, part] + 2 * drift[0][:, part] for part in parts]
    messages = [Vote(), Vote()]
    for cache, h, vote in zip(caches[1:], now[1:], messages, strict=True):
        cache.choose(cache.measure(h), vote)
    total = messages[0].message + messages[1].message
    whole = caches[0].choose(caches[0].measure(now[0]))
    for cache, h in zip(caches[1:], now[1:], strict=True):
        decisions = cache.choose(cache.measure(h), Vote(total))
        assert torch.equal(decisions[:, 1], whole[:, 1])
        torch.testing.assert_close(decisions[:, 0], whole[:, 0], rtol=1e-5, atol=0)
    assert whole[:, 1].any()
