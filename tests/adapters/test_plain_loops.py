"""A loop that only calls its blocks is not gone through on cached steps; any other one is."""

import inspect
import sys
import types

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, WanTransformer3DModel
from diffusers.models import HunyuanDiT2DModel, SD3Transformer2DModel

import dbcache
from dbcache import BlockAdapter, ForwardPattern
from dbcache.adapters.blocks.plain_loops import plain_loops

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

STEPS = 8


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, hidden_states):
        return hidden_states + 0.2 * torch.tanh(self.linear(hidden_states))


class Model(torch.nn.Module):
    """Base of models whose forwards differ."""

    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block() for _ in range(7)])
        tiny.fill(self, 1)


class Plain(Model):
    def forward(self, hidden_states, control=None):
        for index, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
            if control is not None:
                hidden_states = hidden_states + control * (index == len(self.blocks) - 1)
        return hidden_states


class Keeps(Model):
    def forward(self, hidden_states, control=None):
        seen = []
        for block in self.blocks:
            hidden_states = block(hidden_states)
            seen.append(hidden_states)
        self.seen = len(seen)
        return hidden_states


class Counts(Model):
    def forward(self, hidden_states, control=None):
        for index, block in enumerate(self.blocks):  # noqa: B007
            hidden_states = block(hidden_states)
        self.last = index
        return hidden_states


class Chooses(Model):
    def forward(self, hidden_states, control=None):
        for index, block in enumerate(self.blocks):
            if index == 6:
                hidden_states = block(hidden_states * 1.5)
            else:
                hidden_states = block(hidden_states)
        return hidden_states


class Doubles(Model):
    def forward(self, hidden_states, control=None):
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states)
            if index == 6:
                hidden_states = hidden_states * 2
        return hidden_states


class MakesInput(Model):
    def forward(self, hidden_states, control=None):
        control = torch.ones(()) if control is None else control
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states)
            if control is not None:
                hidden_states = hidden_states + 0.1 * control * (index == 6)
        return hidden_states


class Looks(Model):
    def forward(self, hidden_states, control=None):
        self.whole = [*zip(self.blocks, range(99), strict=False)]
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class Takes(Model):
    def forward(self, hidden_states, control=None):
        scales = [1.0, 1.5, 0.5, 1.0, 1.0, 1.0, 2.0]
        for block in self.blocks:
            hidden_states = block(hidden_states * scales.pop(0))
        return hidden_states


NOT_PLAIN = [Keeps, Counts, Chooses, Doubles, MakesInput, Looks, Takes]


def turns_of(model, **inputs):
    """Return the output of a call, and how often the loop's first line began a turn."""
    code = inspect.unwrap(type(model).forward).__code__
    lines, first = inspect.getsourcelines(code)
    at = first + next(i for i, line in enumerate(lines) if line.strip().startswith("for "))
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code is not code:
            return None
        count += event == "line" and frame.f_lineno == at
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return model(**inputs), count - 1  # the last time, the loop finds its end
    finally:
        sys.settrace(before)


@torch.no_grad()
def run(cls, control=None, **options):
    """Return outputs, turns and cached steps of a request."""
    model = cls()
    adapter = BlockAdapter(
        transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_3
    )
    dbcache.enable(
        adapter,
        **{"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.1} | options,
        num_inference_steps=STEPS,
    )
    results = []
    for step in range(STEPS):
        x = tiny.noise(1, 7, 8, seed=3) * (1 + 0.04 * step)
        results.append(turns_of(model, hidden_states=x, control=control))
    (lane,) = dbcache.summary(adapter, logging=False).lanes
    assert 0 < len(lane.cached_steps) < STEPS - 1
    outputs, turns = zip(*results, strict=True)
    return outputs, turns, lane.cached_steps


@pytest.fixture
def never_plain(monkeypatch):
    def use():
        monkeypatch.setattr("dbcache.adapters.requests.setup.plain_loops", lambda forward: {})

    return use


@pytest.mark.parametrize("bn", [0, 2])
def test_a_plain_loop_ends_early_on_cached_steps_alone(bn, never_plain):
    outputs, turns, cached = run(Plain, Bn_compute_blocks=bn)
    # the Fn block, the first middle one, the last middle one, the Bn blocks
    assert turns == tuple(3 + bn if step in cached else 7 for step in range(STEPS))
    never_plain()
    again, all_turns, cached_again = run(Plain, Bn_compute_blocks=bn)
    assert set(all_turns) == {7}
    assert cached_again == cached
    assert all(map(torch.equal, outputs, again))


@pytest.mark.parametrize("cls", NOT_PLAIN)
def test_a_loop_that_does_more_runs_to_its_end(cls):
    assert plain_loops(cls().forward) == {}
    _, turns, _ = run(cls)
    assert set(turns) == {7}


def test_a_loop_that_uses_an_input_runs_to_its_end_where_that_is_given(never_plain):
    control = tiny.noise(1, 7, 8, seed=4)
    outputs, turns, _ = run(Plain, control)
    assert set(turns) == {7}
    never_plain()
    assert all(map(torch.equal, outputs, run(Plain, control)[0]))


@torch.no_grad()
def test_a_forward_that_is_replaced_goes_by_its_own_loop():
    outputs = []
    for is_replaced_before in (True, False):
        model = Plain()
        adapter = BlockAdapter(
            transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_3
        )
        options = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 1.0}
        if is_replaced_before:
            model.forward = types.MethodType(Doubles.forward, model)
        dbcache.enable(adapter, **options, num_inference_steps=4)
        for _ in range(4):
            model(hidden_states=tiny.noise(1, 7, 8, seed=3))
        model.forward = types.MethodType(Doubles.forward, model)
        with dbcache.start_request(model):
            outputs.append([model(hidden_states=tiny.noise(1, 7, 8, seed=3)) for _ in range(4)])
    assert all(map(torch.equal, *outputs))


def test_a_forward_without_a_source_has_no_plain_loops():
    scope = {}
    exec("def forward(self, x):\n    for b in self.blocks:\n        x = b(x)\n    return x", scope)
    assert plain_loops(scope["forward"]) == {}
    assert plain_loops(len) == {}


@pytest.mark.parametrize(
    ("cls", "needs"),
    [
        (
            FluxTransformer2DModel,
            {
                "transformer_blocks": {"controlnet_block_samples"},
                "single_transformer_blocks": {"controlnet_single_block_samples"},
            },
        ),
        (QwenImageTransformer2DModel, {"transformer_blocks": {"controlnet_block_samples"}}),
        (WanTransformer3DModel, {"blocks": set()}),
        (SD3Transformer2DModel, {}),  # leaves blocks out by their number
        (HunyuanDiT2DModel, {}),  # long skip connections
    ],
)
def test_loops_of_real_models(cls, needs):
    assert plain_loops(cls.forward) == needs
