"""BlockAdapter(auto=True) where diffusers' `TransformerBlockRegistry` describes the blocks."""

import inside
import pytest
import tiny
import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

import dbcache
from dbcache import BlockAdapter, ForwardPattern
from dbcache.adapters.blocks.declared import declared
from dbcache.adapters.models.lookup import find_specs

OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 1.0}
X, Y = tiny.noise(1, 5, 4, seed=1), tiny.noise(1, 5, 4, seed=2)


class Block(torch.nn.Module):
    """Returns (text, image), which its source does not tell."""

    def __init__(self):
        super().__init__()
        self.of_image, self.of_text = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, text, image):
        made = text + self.of_text(image).tanh(), image + self.of_image(text).tanh()
        return made


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(Block() for _ in range(4))
        tiny.fill(self, 0)

    def forward(self, image, text):
        for part in self.parts:
            text, image = part(text, image)
        return image


@pytest.fixture
def described():
    names = {"hidden_states": "image", "encoder_hidden_states": "text"}
    TransformerBlockRegistry.register(
        Block,
        TransformerBlockMetadata(
            return_hidden_states_index=1,
            return_encoder_hidden_states_index=0,
            **{f"{stream}_argument_name": name for stream, name in names.items()},
        ),
    )
    yield
    del TransformerBlockRegistry._registry[Block]


@torch.no_grad()
def run(adapter, model):
    dbcache.enable(adapter, **OPTIONS)
    outputs = [model(X + 0.01 * step, Y) for step in range(4)]
    (lane,), (stack,) = dbcache.summary(model, logging=False), inside.stacks(model)
    dbcache.disable(model)
    return outputs, lane.cached_steps, stack


def test_streams_and_their_order_are_those_declared_from_the_first_step_on(described):
    model = Model()
    by_hand = BlockAdapter(
        transformer=model,
        blocks=model.parts,
        forward_pattern=ForwardPattern.Pattern_1,
        streams=("image", "text"),
    )
    expected, steps, _ = run(by_hand, model)
    outputs, cached, stack = run(BlockAdapter(transformer=model, auto=True), model)
    assert (stack.streams, stack.pattern) == (("image", "text"), ForwardPattern.Pattern_1)
    assert cached == steps == [1, 2, 3]  # no forward was needed to learn it
    assert all(map(torch.equal, outputs, expected))


def test_without_the_declaration_a_forward_is_needed():
    _, cached, _ = run(BlockAdapter(transformer=(model := Model()), auto=True), model)
    assert cached == [2, 3]


@pytest.mark.parametrize("family", ["flux", "qwen", "wan"])
def test_what_diffusers_declares_is_what_the_table_says(family):
    (spec,) = find_specs(tiny.FAMILIES[family].build())
    for stack in spec.stacks:
        for block_list in stack.lists:
            assert declared(block_list.blocks[0])[0].returns == stack.pattern.returns
