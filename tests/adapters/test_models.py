"""Every row of the table of models, on a tiny real model of its class."""

import contextlib

import diffusers
import models
import pytest
import torch
from model_case import find_class
from replay import replayed

import dbcache
from dbcache.adapters.models import lookup as registry
from dbcache.adapters.models.table import MODELS

NAMES = list(models.CASES)
STEPS = 6
ONE_BRANCH = {"enable_separate_cfg": False}
FORCED = {"max_warmup_steps": 2, "residual_diff_threshold": 1.0, **ONE_BRANCH}
SETTINGS = {"F1B0": (1, 0), "F2B1": (2, 1), "F1B2": (1, 2)}


@pytest.fixture(params=NAMES)
def name(request):
    if find_class(request.param) is None:
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    yield request.param
    dbcache.disable(models.model(request.param))


def always_run(name, setting):
    """Return Fn and Bn of a setting, with as many first blocks as long skips need."""
    fn, bn = SETTINGS[setting]
    return (max(fn, bn) if models.CASES[name].long_skips else fn), bn


@contextlib.contextmanager
def counted(name):
    """Count the calls of each block of each stack."""
    stacks = models.stacks_of(name)
    calls = [[0] * len(blocks) for blocks in stacks]

    def count(stack, block):
        calls[stack][block] += 1

    hooks = [
        block.register_forward_pre_hook(lambda *_, at=(s, b): count(*at))
        for s, blocks in enumerate(stacks)
        for b, block in enumerate(blocks)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def expected_calls(name, fn, bn, full_steps):
    """Return the calls of each block of each stack in `STEPS` steps."""
    return [
        [full if i in middle else STEPS for i in range(len(blocks))]
        for blocks, middle, full in zip(
            models.stacks_of(name), models.middles_of(name, fn, bn), full_steps, strict=True
        )
    ]


def test_every_row_has_a_case_and_every_case_a_row():
    assert sorted(models.CASES) == sorted(row.transformer for row in MODELS)


def test_never_caching_is_bit_identical_and_disabling_leaves_no_trace(name):
    model = models.model(name)
    before = dict(model.__dict__), type(model)
    plain = models.run(name, STEPS)
    dbcache.enable(model, Fn_compute_blocks=1, residual_diff_threshold=0.0, **ONE_BRANCH)
    assert all(map(torch.equal, models.run(name, STEPS), plain))
    lanes = dbcache.summary(model).lanes
    assert [(lane.steps, lane.cached_steps) for lane in lanes] == [(STEPS, [])] * len(
        models.CASES[name].stacks
    )
    dbcache.disable(model)
    assert (dict(model.__dict__), type(model)) == before
    assert all(map(torch.equal, models.run(name, STEPS), plain))


@pytest.mark.covering(1)
@pytest.mark.parametrize("setting", SETTINGS)
def test_cached_steps_skip_the_middle_blocks_and_no_other(name, setting):
    model, stacks = models.model(name), models.stacks_of(name)
    fn, bn = always_run(name, setting)
    dbcache.enable(model, Fn_compute_blocks=fn, Bn_compute_blocks=bn, **FORCED)
    with counted(name) as calls:
        outputs = models.run(name, STEPS)
    assert calls == expected_calls(name, fn, bn, full_steps=[2] * len(stacks))
    cached = [lane.cached_steps for lane in dbcache.summary(model).lanes]
    assert cached == [[2, 3, 4, 5]] * len(stacks)
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.covering(1)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_input_gives_the_same_output_full_and_cached(name, setting):
    fn, bn = always_run(name, setting)
    plain = models.run(name, 1, seeds=[7])[0]
    config = {"Fn_compute_blocks": fn, "Bn_compute_blocks": bn, **FORCED, "max_warmup_steps": 1}
    dbcache.enable(models.model(name), **config)
    full, cached = models.run(name, 2, seeds=[7, 7])
    assert torch.equal(full, plain)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("setting", SETTINGS)
def test_cached_outputs_are_those_of_a_replay_in_plain_torch(name, setting):
    fn, bn = always_run(name, setting)
    expected = []
    with replayed(name, fn, bn) as replays:
        for step, seed in enumerate((7, 8, 9)):
            for replay in replays:
                replay.cached = step > 0
            expected += models.run(name, 1, seeds=[seed])
    config = {"Fn_compute_blocks": fn, "Bn_compute_blocks": bn, **FORCED, "max_warmup_steps": 1}
    dbcache.enable(models.model(name), **config)
    for output, wanted in zip(models.run(name, 3, seeds=[7, 8, 9]), expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


SEVERAL = [name for name in NAMES if len(models.CASES[name].stacks) > 1]


@pytest.mark.parametrize("name", SEVERAL, indirect=True)
def test_each_stack_decides_for_itself(name):
    model, stacks = models.model(name), models.stacks_of(name)
    never = dbcache.DBCacheConfig(residual_diff_threshold=0.0)
    changes = [None, *[dbcache.ParamsModifier(cache_config=never)] * (len(stacks) - 1)]
    dbcache.enable(model, Fn_compute_blocks=1, params_modifiers=changes, **FORCED)
    with counted(name) as calls:
        models.run(name, STEPS)
    assert calls == expected_calls(name, 1, 0, full_steps=[2, *[STEPS] * (len(stacks) - 1)])


@pytest.mark.parametrize("name", SEVERAL, indirect=True)
def test_the_first_stack_may_decide_for_all(name):
    model = models.model(name)
    plain = models.run(name, 1, seeds=[7])[0]
    one = {"Fn_compute_blocks": 1, "decision_scope": "model", "max_warmup_steps": 1}
    dbcache.enable(model, **FORCED | one)
    full, cached = models.run(name, 2, seeds=[7, 7])
    assert torch.equal(full, plain)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)
    lanes = dbcache.summary(model).lanes
    assert [lane.cached_steps for lane in lanes] == [[1]] * len(models.CASES[name].stacks)


def test_a_model_is_supported_by_its_row_alone(name, monkeypatch):
    monkeypatch.delitem(registry._ROWS, name)
    with pytest.raises(ValueError, match=name):
        dbcache.enable(models.model(name))
    monkeypatch.undo()
    dbcache.enable(models.model(name), Fn_compute_blocks=1)


LONG_SKIPS = [name for name in NAMES if models.CASES[name].long_skips]


@pytest.mark.parametrize("name", LONG_SKIPS, indirect=True)
def test_long_skips_refuse_more_last_blocks_than_first_ones(name):
    model = models.model(name)
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match="at most Fn_compute_blocks, got 2 and 1: long skip"):
        dbcache.enable(model, Fn_compute_blocks=1, Bn_compute_blocks=2)
    assert model.__dict__ == before
