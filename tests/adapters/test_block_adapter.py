"""BlockAdapter and the table of models: what is accepted, what is refused and how."""

import inside
import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel

import dbcache
from dbcache import BlockAdapter, DBCacheConfig, ForwardPattern, ParamsModifier
from dbcache.adapters.models.lookup import row_of
from dbcache.adapters.models.table import MODELS

FLUX = tiny.FAMILIES["flux"]
LISTS = FLUX.lists


def stacks(target):
    return inside.stacks(target)


def test_flux_is_one_chain_by_default():
    model = tiny.flux()
    dbcache.enable(model, Fn_compute_blocks=1, Bn_compute_blocks=7)
    (stack,) = stacks(model)
    assert stack.name == "transformer_blocks+single_transformer_blocks"
    assert (stack.num_blocks, stack.fn, stack.bn) == (10, 1, 7)


def test_two_lists_in_an_adapter_are_two_stacks_with_their_own_settings():
    model = tiny.flux()
    adapter = BlockAdapter(
        transformer=model,
        blocks=[getattr(model, name) for name in LISTS],
        forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_1],
        params_modifiers=[
            ParamsModifier(cache_config=DBCacheConfig().reset(Fn_compute_blocks=2)),
            ParamsModifier(calibrator_config=dbcache.TaylorSeerCalibratorConfig()),
        ],
    )
    config = DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1.0, Bn_compute_blocks=1
    )
    assert dbcache.enable(adapter, config) is adapter
    double, single = stacks(model)
    assert (double.fn, double.settings.slots) == (2, 1)
    assert (single.fn, single.settings.slots) == (1, 2)
    tiny.denoise(model, FLUX, 6)
    assert [lane.stack for lane in dbcache.summary(adapter).lanes] == list(LISTS)
    assert all(lane.cached_steps == [1, 2, 3, 4, 5] for lane in dbcache.summary(adapter).lanes)
    dbcache.disable(adapter)
    assert "_dbcache" not in model.__dict__


def test_adapter_with_a_pipe_makes_its_calls_requests():
    pipe = tiny.pipeline("qwen")
    adapter = BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=pipe.transformer.transformer_blocks,
        forward_pattern=ForwardPattern.Pattern_1,
    )
    dbcache.enable(adapter, Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1.0)
    for _ in range(2):
        tiny.generate(pipe, 4)
        assert [lane.steps for lane in dbcache.summary(pipe).lanes] == [4, 4]
    dbcache.disable(adapter)
    assert not hasattr(pipe, "_dbcache")


def test_adapter_for_two_transformers():
    pipe = tiny.pipeline("wan2.2")
    pair = [pipe.transformer, pipe.transformer_2]
    adapter = BlockAdapter(
        pipe=pipe,
        transformer=pair,
        blocks=[model.blocks for model in pair],
        forward_pattern=[ForwardPattern.Pattern_2] * 2,
        params_modifiers=[
            ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=4)),
            ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=2)),
        ],
        has_separate_cfg=True,
    )
    dbcache.enable(adapter, Fn_compute_blocks=1, residual_diff_threshold=1.0)
    tiny.generate(pipe, 12)
    warm = [lane.counts["warm-up"] for lane in dbcache.summary(pipe).lanes]
    assert warm == [4, 4, 2, 2]


def test_unsupported_model_lists_what_is_supported_and_how_to_write_an_adapter():
    with pytest.raises(ValueError, match="Supported") as caught:
        dbcache.enable(torch.nn.Linear(2, 2))
    for row in MODELS:
        assert row.transformer in str(caught.value)
    assert "BlockAdapter(" in str(caught.value)
    with pytest.raises(TypeError, match=r"must be a pipeline, .* got 'a string'"):
        dbcache.enable("a string")


def test_subclass_of_a_supported_class_is_supported():
    class Mine(FluxTransformer2DModel):
        pass

    model = tiny.flux()
    model.__class__ = Mine
    assert row_of(model).transformer == "FluxTransformer2DModel"


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"blocks": None}, TypeError, "blocks must be a ModuleList"),
        ({"blocks": [5]}, TypeError, "blocks must be a ModuleList .* got int"),
        ({"blocks": None, "blocks_name": [[]]}, ValueError, "at least one list per transformer"),
        ({"transformer": "model"}, TypeError, "transformer must be an nn.Module"),
        ({"forward_pattern": None}, TypeError, "forward_pattern must be one of"),
        ({"forward_pattern": "Pattern_1"}, TypeError, "forward_pattern must be a ForwardPattern"),
        ({"forward_pattern": [ForwardPattern.Pattern_1] * 2}, ValueError, "one entry per"),
        ({"params_modifiers": [DBCacheConfig()]}, TypeError, "ParamsModifier"),
    ],
)
def test_adapter_that_does_not_fit_together_is_refused(fields, error, text):
    model = tiny.flux()
    given = {
        "transformer": model,
        "blocks": model.transformer_blocks,
        "forward_pattern": ForwardPattern.Pattern_1,
    }
    with pytest.raises(error, match=text):
        dbcache.enable(BlockAdapter(**{**given, **fields}))
    assert "_dbcache" not in model.__dict__


def test_blocks_that_are_not_the_models_own_are_refused():
    model = tiny.flux()
    sliced = model.transformer_blocks[:2]
    with pytest.raises(ValueError, match="not a copy or a slice"):
        dbcache.enable(
            BlockAdapter(transformer=model, blocks=sliced, forward_pattern=ForwardPattern.Pattern_1)
        )


def test_blocks_that_cannot_take_the_patterns_streams_are_refused():
    class Narrow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.ReLU() for _ in range(3)])

    model = Narrow()
    with pytest.raises(ValueError, match=r"blocks\[0\] \(ReLU\).*must take"):
        dbcache.enable(
            BlockAdapter(
                transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_0
            )
        )


def test_lists_inside_a_submodule_are_found():
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(4)])

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Inner()

        def forward(self, x):
            for layer in self.decoder.layers:
                x = layer(x)
            return x

    model, x = Outer(), torch.ones(1, 4)
    plain = model(x)
    adapter = BlockAdapter(
        transformer=model,
        blocks=model.decoder.layers,
        forward_pattern=ForwardPattern.HIDDEN_TO_HIDDEN,
    )
    dbcache.enable(adapter, Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1.0)
    torch.testing.assert_close(model(x), plain)
    torch.testing.assert_close(model(x), plain)
    (lane,) = dbcache.summary(model).lanes
    assert (lane.stack, lane.cached_steps) == ("decoder.layers", [1])
