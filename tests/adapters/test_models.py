"""Every row of the table of models, on a tiny real model of its class."""

import contextlib
import inspect

import diffusers
import models
import pytest
import torch
from model_case import find_class

import dbcache
from dbcache.adapters import registry
from dbcache.adapters.models import MODELS

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


class Replay:
    """Middle blocks of a stack that add what they added on the last full step, in plain PyTorch.

    It wraps the forwards of the blocks. Which of two outputs is the hidden states' is told by the
    shape; the shapes of the two streams differ in all cases.
    """

    def __init__(self, blocks, names):
        self.blocks = blocks
        self.names = names
        self.forwards = [block.forward for block in blocks]
        self.signatures = [inspect.signature(forward) for forward in self.forwards]
        self.outputs = [None] * len(blocks)
        self.cached = False

    def __enter__(self):
        for i, block in enumerate(self.blocks):
            block.forward = lambda *args, i=i, **kwargs: self._forward(i, args, kwargs)
        return self

    def __exit__(self, *_):
        for block in self.blocks:
            del block.forward

    def _streams(self, i, args, kwargs):
        """Return hidden states and encoder states of a call (None where it has none)."""
        bound = self.signatures[i].bind(*args, **kwargs).arguments
        hidden, encoder = (*self.names, None)[:2]
        first = next(iter(bound.values()))
        return bound.get(hidden, first), bound.get(encoder)

    def _forward(self, i, args, kwargs):
        streams = self._streams(i, args, kwargs)
        if i == 0:
            self.start = streams
        is_last = i == len(self.blocks) - 1
        if not self.cached:
            self.outputs[i] = self.forwards[i](*args, **kwargs)
            if is_last:
                self.full_start = self.start
            return self.outputs[i]
        if not is_last:
            return self._like(self.outputs[i], streams)
        # what goes in now, plus what came out on the full step less what went in then
        moved = [
            None if x is None or y is None else x - y
            for x, y in zip(self.start, self.full_start, strict=True)
        ]
        kept = self._by_stream(self.outputs[i])
        return self._like(
            self.outputs[i],
            [None if x is None else x + m for x, m in zip(kept, moved, strict=True)],
        )

    def _is_swapped(self, output):
        return output[0] is None or output[0].shape != self.full_start[0].shape

    def _by_stream(self, output):
        """Return (hidden states, encoder states or None) of what a block returned."""
        if isinstance(output, torch.Tensor):
            return output, None
        if len(output) == 1:
            return output[0], None
        return output[::-1] if self._is_swapped(output) else output

    def _like(self, output, streams):
        """Return the two streams in the form of `output`."""
        if isinstance(output, torch.Tensor):
            return streams[0]
        if len(output) == 1:
            return (streams[0],)
        streams = tuple(
            None if o is None else s for o, s in zip(self._by_stream(output), streams, strict=True)
        )
        return streams[::-1] if self._is_swapped(output) else streams


@contextlib.contextmanager
def replayed(name, fn, bn):
    """Replay the middle blocks of all stacks."""
    with contextlib.ExitStack() as context:
        yield [
            context.enter_context(Replay(blocks[middle.start : middle.stop], names))
            for blocks, names, middle in zip(
                models.stacks_of(name),
                models.streams_of(name),
                models.middles_of(name, fn, bn),
                strict=True,
            )
        ]


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


@pytest.mark.parametrize("setting", SETTINGS)
def test_cached_steps_skip_the_middle_blocks_and_no_other(name, setting):
    model, stacks = models.model(name), models.stacks_of(name)
    fn, bn = SETTINGS[setting]
    dbcache.enable(model, Fn_compute_blocks=fn, Bn_compute_blocks=bn, **FORCED)
    with counted(name) as calls:
        outputs = models.run(name, STEPS)
    assert calls == expected_calls(name, fn, bn, full_steps=[2] * len(stacks))
    cached = [lane.cached_steps for lane in dbcache.summary(model).lanes]
    assert cached == [[2, 3, 4, 5]] * len(stacks)
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_input_gives_the_same_output_full_and_cached(name, setting):
    fn, bn = SETTINGS[setting]
    plain = models.run(name, 1, seeds=[7])[0]
    config = {"Fn_compute_blocks": fn, "Bn_compute_blocks": bn, **FORCED, "max_warmup_steps": 1}
    dbcache.enable(models.model(name), **config)
    full, cached = models.run(name, 2, seeds=[7, 7])
    assert torch.equal(full, plain)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_cached_outputs_are_those_of_a_replay_in_plain_torch(name, setting):
    fn, bn = SETTINGS[setting]
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


def test_a_model_is_supported_by_its_row_alone(name, monkeypatch):
    monkeypatch.delitem(registry._ROWS, name)
    with pytest.raises(ValueError, match=name):
        dbcache.enable(models.model(name))
    monkeypatch.undo()
    dbcache.enable(models.model(name), Fn_compute_blocks=1)
