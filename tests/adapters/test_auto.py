"""BlockAdapter(auto=True): lists and patterns of models that nobody described."""

import inside
import models
import pytest
import tiny
import torch
from diffusers.models.transformers import (
    transformer_bria,
    transformer_cogview4,
    transformer_flux,
    transformer_hunyuan_video,
    transformer_wan,
)
from model_case import find_class

import dbcache
from dbcache import BlockAdapter, DBCacheConfig, ForwardPattern, ParamsModifier
from dbcache.adapters.blocks.discover import guess_pattern

FORCED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}


@pytest.mark.parametrize(
    ("block", "pattern"),
    [
        (transformer_flux.FluxTransformerBlock, ForwardPattern.Pattern_1),
        (transformer_flux.FluxSingleTransformerBlock, ForwardPattern.Pattern_1),
        (transformer_bria.BriaTransformerBlock, ForwardPattern.Pattern_1),
        (transformer_cogview4.CogView4TransformerBlock, ForwardPattern.Pattern_0),
        (transformer_hunyuan_video.HunyuanVideoTransformerBlock, ForwardPattern.Pattern_0),
        (transformer_wan.WanTransformerBlock, ForwardPattern.Pattern_3),
    ],
)
def test_pattern_is_read_from_the_source_of_a_block(block, pattern):
    assert guess_pattern(block.__new__(block)) is pattern


@pytest.mark.parametrize("family", ["flux", "qwen", "wan"])
def test_lists_and_patterns_of_real_models_are_found(family):
    case = tiny.FAMILIES[family]
    model = case.build()
    never = {**FORCED, "residual_diff_threshold": 0.0}
    dbcache.enable(BlockAdapter(transformer=model, auto=True), **never)
    assert tuple(stack.name for stack in inside.stacks(model)) == tuple(case.lists)
    cached = tiny.denoise(model, case, 6)
    dbcache.disable(model)
    torch.testing.assert_close(cached, tiny.denoise(model, case, 6), rtol=0, atol=0)
    dbcache.enable(BlockAdapter(transformer=model, auto=True), **FORCED)
    tiny.denoise(model, case, 6)
    assert all(lane.cached_steps == [2, 3, 4, 5] for lane in dbcache.summary(model).lanes)


def test_what_else_was_given_is_kept():
    pipe = tiny.pipeline("wan2.2")
    modifiers = [
        ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=n)) for n in (4, 2)
    ]
    adapter = BlockAdapter(
        pipe=pipe,
        transformer=[pipe.transformer, pipe.transformer_2],
        auto=True,
        has_separate_cfg=True,
        params_modifiers=modifiers,
        forward_pattern=ForwardPattern.Pattern_2,
    )
    specs = adapter.specs()
    assert all(spec.separate_cfg for spec in specs)
    assert [spec.stacks[0].modifier for spec in specs] == modifiers
    assert [spec.stacks[0].pattern for spec in specs] == [ForwardPattern.Pattern_2] * 2


def test_pattern_alone_is_found_for_blocks_that_were_given():
    model = tiny.flux()
    (spec,) = BlockAdapter(transformer=model, blocks=model.transformer_blocks, auto=True).specs()
    assert [s.pattern for s in spec.stacks] == [ForwardPattern.Pattern_1]


class Model(torch.nn.Module):
    """Eight large blocks, and two small ones that refine something else."""

    def __init__(self, block):
        super().__init__()
        self.refiner = torch.nn.ModuleList([block(2) for _ in range(2)])
        self.trunk = torch.nn.ModuleList([block(16) for _ in range(8)])


class Block(torch.nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)

    def forward(self, hidden_states):
        hidden_states = super().forward(hidden_states)
        return hidden_states


class Unclear(Block):
    def forward(self, hidden_states, encoder_hidden_states):
        first, second = super().forward(hidden_states), encoder_hidden_states
        return first, second


def test_small_lists_are_left_alone():
    (spec,) = BlockAdapter(transformer=Model(Block), auto=True).specs()
    assert [stack.lists[0].path for stack in spec.stacks] == ["trunk"]


class HasFunctions(Unclear):
    def forward(self, hidden_states, encoder_hidden_states):
        try:
            return encoder_hidden_states, hidden_states
        finally:

            def after(hidden_states):
                return hidden_states


def test_what_functions_inside_of_a_block_return_does_not_count():
    assert guess_pattern(HasFunctions(4)) is ForwardPattern.Pattern_1


def test_pattern_that_is_named_counts_where_the_source_leaves_it_open():
    model = Model(Unclear)
    assert guess_pattern(model.trunk[0]) is None
    adapter = BlockAdapter(transformer=model, auto=True, forward_pattern=ForwardPattern.Pattern_0)
    (spec,) = adapter.specs()
    assert [stack.pattern for stack in spec.stacks] == [ForwardPattern.Pattern_0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Cosmos3OmniTransformer", [(ForwardPattern.Pattern_1, ("gen_seq", "und_seq"))]),
        ("Kandinsky5Transformer3DModel", [(ForwardPattern.Pattern_3, ("visual_embed",))]),
        # what diffusers declares of Bria's double blocks is wrong: the source counts
        ("BriaTransformer2DModel", [(ForwardPattern.Pattern_1, ("hidden_states",))] * 2),
    ],
)
def test_where_the_source_leaves_it_open_what_diffusers_declares_counts(name, expected):
    if find_class(name) is None:
        pytest.skip("absent in this diffusers")
    (spec,) = BlockAdapter(transformer=models.model(name), auto=True).specs()
    found = [
        (stack.pattern, stack.streams[: len(names)])
        for stack, (_, names) in zip(spec.stacks, expected, strict=True)
    ]
    assert found == expected
    named = BlockAdapter(transformer=models.model(name), auto=True, streams=("own", "names"))
    if expected[0][1][0] != "hidden_states":
        with pytest.raises(ValueError, match="must take"):
            named.specs()


def test_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="must have a ModuleList of blocks"):
        dbcache.enable(BlockAdapter(transformer=torch.nn.Linear(2, 2), auto=True))


def test_lists_that_do_not_fit_the_named_pattern_are_left_out():
    with pytest.raises(ValueError, match="that fit Pattern_0"):
        dbcache.enable(
            BlockAdapter(
                transformer=Model(Block), auto=True, forward_pattern=ForwardPattern.Pattern_0
            )
        )


NAMES = (
    "AceStepTransformer1DModel",
    "AllegroTransformer3DModel",
    "BriaTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "CogView4Transformer2DModel",
    "Cosmos3OmniTransformer",
    "CosmosTransformer3DModel",
    "EasyAnimateTransformer3DModel",
    "FluxTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "Kandinsky5Transformer3DModel",
    "Kandinsky6Transformer3DModel",
    "LTX2VideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "LongCatAudioDiTTransformer",
    "MochiTransformer3DModel",
    "OvisImageTransformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SanaTransformer2DModel",
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
)
"""Classes of diffusers for which the automatic adapter must say what the table of models says."""


def described(target):
    """Return (list, what a block returns, names of the streams that it does) of each list."""
    return [
        (block_list.path, stack.pattern.returns, stack.streams[: len(stack.pattern.returns)])
        for stack in inside.stacks(target)
        for block_list in stack.lists
    ]


@pytest.mark.filterwarnings("ignore:.*vace_blocks is not cached")
@pytest.mark.parametrize("name", NAMES)
def test_what_is_found_is_what_the_table_says(name):
    if find_class(name) is None:
        pytest.skip("absent in this diffusers")
    model = models.model(name)
    forced = {**FORCED, "enable_separate_cfg": False}
    dbcache.enable(model, **forced)
    expected, outputs = described(model), models.run(name, 4)
    one_list_each = all(len(stack.lists) == 1 for stack in inside.stacks(model))
    dbcache.enable(BlockAdapter(transformer=model, auto=True), **forced)
    found = models.run(name, 4)
    assert described(model) == expected
    assert all(lane.cached_steps == [2, 3] for lane in dbcache.summary(model).lanes)
    if one_list_each:  # a chain has one probe, its lists as stacks have two
        assert all(map(torch.equal, found, outputs))
    dbcache.disable(model)


def test_the_list_of_classes_is_long_enough():
    assert sum(find_class(name) is not None for name in NAMES) >= 15
