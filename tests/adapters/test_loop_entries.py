"""Whatever a model's loop does with its list of blocks: the same steps, outputs and block calls."""

import pytest
import tiny
import torch

import dbcache
from dbcache import BlockAdapter, ForwardPattern

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

STEPS = 8


class Block(torch.nn.Module):
    """Adds a residual to one stream, or to two."""

    gain = 0.2

    def __init__(self, two):
        super().__init__()
        self.linear, self.two, self.calls = torch.nn.Linear(8, 8), two, 0

    def forward(self, hidden_states, encoder_hidden_states=None):
        self.calls += 1
        hidden = hidden_states + self.gain * torch.tanh(self.linear(hidden_states))
        if not self.two:
            return hidden
        return encoder_hidden_states + 0.1 * hidden[:, :3], hidden


def indexed(blocks):
    return [blocks[i] for i in range(len(blocks))]  # proxies, as all loops had them once


def numbered(blocks):
    return (block for _, block in enumerate(blocks))


def read(blocks):
    for block in blocks:
        assert block.gain == Block.gain
        yield block


def sliced(blocks):
    return blocks[:]


LOOPS = {"plain": iter, "ahead": list, "numbered": numbered, "reads": read, "slices": sliced}


class Model(torch.nn.Module):
    def __init__(self, two, by_name):
        super().__init__()
        self.two, self.by_name, self.loop = two, by_name, indexed
        self.blocks = torch.nn.ModuleList([Block(two) for _ in range(7)])
        tiny.fill(self, 1)

    def forward(self, hidden_states, encoder_hidden_states, control=None):
        hidden, encoder = hidden_states, encoder_hidden_states
        for index, block in enumerate(self.loop(self.blocks)):
            if not self.two:
                hidden = block(hidden_states=hidden) if self.by_name else block(hidden)
            elif self.by_name:
                encoder, hidden = block(hidden_states=hidden, encoder_hidden_states=encoder)
            else:
                encoder, hidden = block(hidden, encoder)
            if control is not None and index == 2:
                hidden = hidden + control
        return hidden, encoder


@torch.no_grad()
def run(two, by_name, loops):
    """Return outputs, calls of each block and the lanes of two requests in a row."""
    model = Model(two, by_name)
    pattern = ForwardPattern.Pattern_1 if two else ForwardPattern.Pattern_3
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=pattern)
    options = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.1}
    dbcache.enable(adapter, **options, num_inference_steps=STEPS)
    outputs = []
    for request, loop in enumerate(loops):
        model.loop = loop
        for step in range(STEPS):
            x = tiny.noise(1, 7, 8, seed=3) * (1 + 0.04 * step)
            control = tiny.noise(1, 7, 8, seed=4) if request else None
            outputs += model(x, tiny.noise(1, 3, 8, seed=5), control)
    (lane,) = dbcache.summary(adapter, logging=False).lanes
    assert 0 < len(lane.cached_steps) < STEPS - 1
    return outputs, [block.calls for block in model.blocks], lane.cached_steps


@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
@pytest.mark.parametrize("two", [False, True], ids=["one stream", "two streams"])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_way_to_go_through_the_blocks_is_the_same(loop, two, by_name):
    outputs, calls, cached = run(two, by_name, [indexed, indexed])
    for loops in ([LOOPS[loop]] * 2, [iter, LOOPS[loop]]):
        again, calls_again, cached_again = run(two, by_name, loops)
        assert calls_again == calls
        assert cached_again == cached
        assert all(map(torch.equal, outputs, again))
