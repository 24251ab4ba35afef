"""BlockAdapter(auto=True): lists and patterns of models that nobody described."""

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

import dbcache
from dbcache import BlockAdapter, DBCacheConfig, ForwardPattern, ParamsModifier
from dbcache.adapters.auto import guess_pattern

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
    assert tuple(stack.name for stack in model._dbcache.stacks) == tuple(case.lists)
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


def test_open_order_of_the_streams_must_be_named():
    model = Model(Unclear)
    with pytest.raises(ValueError, match="pass forward_pattern"):
        dbcache.enable(BlockAdapter(transformer=model, auto=True))
    adapter = BlockAdapter(transformer=model, auto=True, forward_pattern=ForwardPattern.Pattern_0)
    (spec,) = adapter.specs()
    assert [stack.pattern for stack in spec.stacks] == [ForwardPattern.Pattern_0]
    assert "_dbcache" not in model.__dict__


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
