"""The notation for block stacks, and streams under names of their own."""

import pytest
import torch

import dbcache
from dbcache import ForwardPattern
from dbcache.adapters.blocks.spec import StackSpec
from dbcache.adapters.models.row import parse_stacks


@pytest.mark.parametrize(
    ("text", "stacks"),
    [
        ("blocks: h -> h", [(("blocks",), StackSpec((), ForwardPattern.Pattern_3))]),
        ("a + b.c: h, e -> e, h", [(("a", "b.c"), StackSpec((), ForwardPattern.Pattern_1))]),
        (
            "a: h, e -> h; b: x -> x",
            [
                (("a",), StackSpec((), ForwardPattern.Pattern_2)),
                (("b",), StackSpec((), ForwardPattern.Pattern_3, ("x", "encoder_hidden_states"))),
            ],
        ),
        (
            "a: h, audio -> audio, h",
            [(("a",), StackSpec((), ForwardPattern.Pattern_1, ("hidden_states", "audio")))],
        ),
        (
            "a: e -> e",
            [(("a",), StackSpec((), ForwardPattern.Pattern_3, ("encoder_hidden_states",) * 2))],
        ),
        ("a: h -> h, e", [(("a",), StackSpec((), ForwardPattern.Pattern_4))]),
        (
            "a & b: h -> h",
            [(("a", "b"), StackSpec((), ForwardPattern.Pattern_3, interleaved=True))],
        ),
        (
            "a[:-n]: h -> h; a[-n:]: h -> h",
            [((part,), StackSpec((), ForwardPattern.Pattern_3)) for part in ("a[:-n]", "a[-n:]")],
        ),
    ],
)
def test_the_notation_reads_as_it_is_written(text, stacks):
    assert parse_stacks(text) == tuple(stacks)


@pytest.mark.parametrize("text", ["", "blocks", "blocks: h", "a: h, e, f -> h", "a: h -> e", "a:b"])
def test_what_is_not_the_notation_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="blocks: h, e -> e, h"):
        parse_stacks(text)


class NamedBlock(torch.nn.Module):
    """Two streams under names of its own, the second one first."""

    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        self.calls = 0

    def forward(self, sound, picture):
        self.calls += 1
        step = self.linear(picture).tanh()
        return picture + 0.1 * step, sound + 0.1 * step.mean(1, keepdim=True)


class NamedModel(torch.nn.Module):
    def __init__(self, by_position):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(NamedBlock(8) for _ in range(6))
        self.by_position = by_position

    def forward(self, picture):
        sound = picture[:, :1]
        for layer in self.layers:
            if self.by_position:
                picture, sound = layer(sound, picture)
            else:
                picture, sound = layer(sound=sound, picture=picture)
        return torch.cat([picture, sound], 1)


@pytest.mark.parametrize("by_position", [False, True])
@torch.no_grad()
def test_streams_go_by_the_names_that_the_adapter_gives(by_position):
    model = NamedModel(by_position)
    adapter = dbcache.BlockAdapter(
        transformer=model,
        blocks=model.layers,
        forward_pattern=ForwardPattern.Pattern_0,
        streams=("picture", "sound"),
    )
    x = torch.randn(1, 4, 8)
    plain = model(x)
    dbcache.enable(adapter, Fn_compute_blocks=1, residual_diff_threshold=1.0, max_warmup_steps=1)
    full, cached = model(x), model(x)
    assert torch.equal(full, plain)
    torch.testing.assert_close(cached, plain)
    assert [layer.calls for layer in model.layers] == [3, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("streams", "error", "text"),
    [
        (("picture", "noise"), ValueError, r"must take \(picture, noise\), got \(sound, picture\)"),
        ((), TypeError, "one or two parameters"),
        (("a", "b", "c"), TypeError, "one or two parameters"),
        (3, TypeError, "one or two parameters"),
    ],
)
def test_wrong_stream_names_are_refused(streams, error, text):
    model = NamedModel(by_position=True)
    adapter = dbcache.BlockAdapter(
        transformer=model,
        blocks=model.layers,
        forward_pattern=ForwardPattern.Pattern_0,
        streams=streams,
    )
    with pytest.raises(error, match=text):
        dbcache.enable(adapter)


class DictModel(torch.nn.Module):
    """Lists in a `ModuleDict`, which a forward looks up by key."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.modes = torch.nn.ModuleDict(
            {name: torch.nn.ModuleList(Block() for _ in range(4)) for name in ("image", "text")}
        )

    def forward(self, x, fails=False):
        assert "image" in self.modes
        for name, blocks in self.modes.items():
            for block in blocks:
                x = block(x)
            if fails and name == "text":
                raise RuntimeError("stop")
        return x


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.calls = 0

    def forward(self, hidden_states):
        self.calls += 1
        return hidden_states + 0.1 * self.linear(hidden_states).tanh()


@torch.no_grad()
def test_lists_may_lie_in_a_module_dict():
    model, x = DictModel(), torch.randn(1, 4, 8)
    before, plain = dict(model.__dict__), model(x)
    adapter = dbcache.BlockAdapter(
        transformer=model, blocks=[*model.modes.values()], forward_pattern=ForwardPattern.Pattern_3
    )
    dbcache.enable(adapter, Fn_compute_blocks=1, residual_diff_threshold=1.0, max_warmup_steps=1)
    full, cached = model(x), model(x)
    assert torch.equal(full, plain)
    torch.testing.assert_close(cached, plain)
    for blocks in model.modes.values():
        assert [block.calls for block in blocks] == [3, 2, 2, 2]
    with pytest.raises(RuntimeError, match="stop"):
        model(x, fails=True)
    assert isinstance(model.modes, torch.nn.ModuleDict)
    dbcache.disable(adapter)
    assert dict(model.__dict__) == before
