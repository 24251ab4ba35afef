"""`Bn_compute_blocks_ids`: of the last blocks only some run on a cached step, as in the oracle."""

import copy
from dataclasses import replace

import inside
import pytest
import torch
from engines import assert_same, options, run_dbcache
from oracle import Oracle, Rule
from tiny import BRANCHES, FAMILIES, denoise

import dbcache
from dbcache import DBCacheConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 24
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)

RULES = {
    "every second": Rule(
        Bn_compute_blocks=4, Bn_compute_blocks_ids=(0, 2), residual_diff_threshold=0.15
    ),
    "the last alone": Rule(
        Bn_compute_blocks=4,
        Bn_compute_blocks_ids=(3,),
        residual_diff_threshold=0.25,
        non_compute_blocks_diff_threshold=0.06,
        order=1,
    ),
    "hardly ever": Rule(
        Bn_compute_blocks=3,
        Bn_compute_blocks_ids=(1,),
        residual_diff_threshold=0.2,
        non_compute_blocks_diff_threshold=0.0,
    ),
}


def compare(family, rule, **how):
    """Run both on fresh copies; return the oracle and the calls of the last blocks."""
    mine, theirs = family.build(), family.build()
    blocks = [b for name in family.lists for b in getattr(mine, name)]
    calls = [0] * len(blocks)

    def count(i):
        calls[i] += 1

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: count(i))
    run = run_dbcache(mine, family, rule, STEPS, **how)
    with Oracle(theirs, family.lists, family.encoder_first, rule) as oracle:
        expected = denoise(theirs, family, STEPS, **how)
    for output, wanted in zip(run.outputs, expected, strict=True):
        assert (output - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    lanes = oracle.requests[-1].values()
    assert [lane.reasons for lane in run.lanes] == [lane.decider.trace.reasons for lane in lanes]
    steps = STEPS * len(run.lanes)
    left_out = [i for lane in lanes for step in lane.left_out for i in step]
    tail = [steps - left_out.count(i) for i in range(rule.Bn_compute_blocks)]
    assert calls[-rule.Bn_compute_blocks :] == tail
    return lanes, left_out


@families
@pytest.mark.parametrize("case", RULES)
def test_equals_the_oracle(family, case):
    rule = replace(RULES[case], enable_separate_cfg=False)
    lanes, left_out = compare(family, rule)
    (lane,) = lanes
    assert lane.decider.trace.cached_steps
    listed = set(rule.Bn_compute_blocks_ids)
    assert not listed & set(left_out)
    assert bool(left_out) == (rule.non_compute_blocks_diff_threshold > 0)


@families
def test_branches_have_what_they_need_of_their_own(family):
    lanes, left_out = compare(
        family, replace(RULES["every second"], enable_separate_cfg=True), branches=BRANCHES
    )
    assert len(lanes) == 2
    assert left_out


@families
def test_without_ids_or_with_all_of_them_every_block_runs(family):
    base = Rule(Bn_compute_blocks=3, residual_diff_threshold=0.15, enable_separate_cfg=False)
    runs = [
        run_dbcache(family.build(), family, replace(base, Bn_compute_blocks_ids=ids), STEPS)
        for ids in ((), (0, 1, 2))
    ]
    assert_same(*runs, tolerance=0)


@families
def test_threshold_0_is_bit_identical_and_disable_leaves_no_trace(family):
    model = family.build()
    plain = denoise(model, family, 12)
    before = dict(vars(model))
    rule = replace(RULES["every second"], residual_diff_threshold=0.0)
    outputs = run_dbcache(model, family, rule, 12).outputs
    dbcache.disable(model)
    assert dict(vars(model)) == before
    assert all(map(torch.equal, outputs, plain))
    assert all(map(torch.equal, denoise(model, family, 12), plain))


def test_memory_is_counted_per_block():
    family, sizes = FAMILIES["flux"], []
    for ids in ((), (0, 2)):
        rule = Rule(Bn_compute_blocks=4, Bn_compute_blocks_ids=ids)
        model = family.build()
        run_dbcache(model, family, rule, 6)
        sizes.append(dbcache.summary(model).lanes[0].megabytes * 1e6)
    hidden, encoder = 16 * 32 * 4, 6 * 32 * 4
    # blocks 1, 2 and 3 of the four: from the first that may be left out to the last
    assert sizes[1] - sizes[0] == pytest.approx(3 * (2 * hidden + encoder))


def test_a_request_starts_anew():
    family = FAMILIES["flux"]
    rule = replace(RULES["every second"], num_inference_steps=STEPS)
    model = family.build()
    first = run_dbcache(model, family, rule, STEPS).outputs
    assert all(map(torch.equal, denoise(model, family, STEPS), first))


def test_an_exception_in_the_tail_aborts_the_step():
    family = FAMILIES["flux"]
    model = family.build()
    rule = replace(RULES["every second"], residual_diff_threshold=1.0, max_warmup_steps=2)
    rule = replace(rule, num_inference_steps=30)
    run_dbcache(model, family, rule, 3)
    last = model.single_transformer_blocks[-2]  # a listed one, which runs on cached steps
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        denoise(model, family, 1)
    handle.remove()
    denoise(model, family, 2)
    always = "threshold is 1 or more"
    reasons = dbcache.summary(model).lanes[0].reasons
    assert reasons == ["warm-up", "warm-up", always, "no reference", always]


def test_a_first_step_that_fails_leaves_nothing_behind():
    """Not all blocks were stored then: how a change grew in them is not known."""
    family, runs = FAMILIES["flux"], []
    rule = replace(
        RULES["the last alone"],
        Bn_compute_blocks_ids=(1,),
        max_warmup_steps=1,
        num_inference_steps=12,
    )
    for fails in (False, True):
        model = family.build()
        dbcache.enable(model, DBCacheConfig(**options(rule)))
        if fails:
            handle = model.single_transformer_blocks[-2].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                denoise(model, family, 1)
            handle.remove()
        changes = []

        def note(model, *_, changes=changes):
            tail = inside.stacks(model)[0].lanes[None].tail
            changes.append((tail.flags.tolist(), tail.blocks.state.growth_sums.tolist()))

        model.register_forward_hook(note)
        runs.append((denoise(model, family, 12), changes))
    assert runs[0][1] == runs[1][1]
    assert any(any(flags) for flags, _ in runs[0][1])
    assert all(map(torch.equal, runs[0][0], runs[1][0]))


def test_blocks_that_are_exchanged_start_anew():
    family, runs = FAMILIES["flux"], []
    rule = replace(RULES["every second"], max_warmup_steps=1, residual_diff_threshold=1.0)
    rule = replace(rule, num_inference_steps=30)
    for exchanges in (False, True):
        model = family.build()
        run_dbcache(model, family, rule, 5)
        if exchanges:
            blocks = model.single_transformer_blocks
            blocks[-1] = copy.deepcopy(blocks[-1])
        else:
            inside.request(model).force_full("to compare with")
        outputs = denoise(model, family, 10)
        runs.append((outputs, dbcache.summary(model).lanes[0].reasons))
    assert runs[0][1] == runs[1][1]
    always = "threshold is 1 or more"
    assert runs[0][1] == ["warm-up", *[always] * 4, "no reference", *[always] * 9]
    assert all(map(torch.equal, runs[0][0], runs[1][0]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"Bn_compute_blocks": 2, "Bn_compute_blocks_ids": [2]}, "from 0 to 1"),
        ({"Bn_compute_blocks_ids": [0]}, "set Bn_compute_blocks, too"),
        ({"Bn_compute_blocks": 2, "Bn_compute_blocks_ids": [0.5]}, "list of block numbers"),
        ({"non_compute_blocks_diff_threshold": -1.0}, ">= 0"),
    ],
    ids=str,
)
def test_bad_options_are_errors(changes, says):
    with pytest.raises((ValueError, TypeError), match=says):
        DBCacheConfig(**changes)


def test_options_of_the_rule_are_those_of_the_config():
    assert set(options(Rule())) <= set(DBCacheConfig().as_dict())
