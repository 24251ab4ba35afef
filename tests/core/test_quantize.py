"""`quantize`: which layers become how narrow, that all is checked before, and caches beside it."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch

import dbcache
from dbcache import QuantizeConfig, quantize
from dbcache.config.quantize import TYPES

pytest.importorskip("torchao")
pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

FAMILY = tiny.FAMILIES["wan"]
CACHED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.6}
CACHED |= {"enable_separate_cfg": False}


def kinds(model):
    """Return the class of the weight of each linear layer, by name."""
    return {
        name: type(layer.weight.data).__name__
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }


def changed(model):
    return {name for name, kind in kinds(model).items() if kind != "Tensor"}


@pytest.mark.parametrize(
    "kind", ["int8_weight_only", "float8_weight_only", "int8", "int8_per_tensor"]
)
def test_layers_of_blocks_are_close_to_what_they_were(kind):
    model, twin = tiny.wan(layers=3), tiny.wan(layers=3)
    blocks = list(model.blocks)
    assert quantize(model, quant_type=kind) is model
    assert list(map(id, model.blocks)) == list(map(id, blocks))
    inside = {name for name in kinds(model) if name.startswith("blocks.")}
    assert changed(model) == inside
    for name in inside:
        mine, theirs = model.get_submodule(name), twin.get_submodule(name)
        x = tiny.noise(2, mine.in_features, seed=1)
        error = (mine(x) - theirs(x)).norm() / theirs(x).norm()
        assert 0 < error < 0.06


@pytest.mark.parametrize("enables_first", [False, True], ids=["before", "after"])
def test_a_cache_decides_the_same_before_and_after(enables_first):
    model, twin = tiny.wan(layers=4), tiny.wan(layers=4)
    quantize(twin, quant_type="int8_weight_only")
    plain = tiny.denoise(twin, FAMILY, 8)
    if enables_first:
        dbcache.enable(model, **CACHED, num_inference_steps=8)
        model_again = quantize(model, quant_type="int8_weight_only")
        assert model_again is model
    else:
        config = QuantizeConfig(quant_type="int8_weight_only")
        dbcache.enable(model, **CACHED, num_inference_steps=8, quantize_config=config)
    first, second = tiny.denoise(model, FAMILY, 8), tiny.denoise(model, FAMILY, 8)
    assert all(map(torch.equal, first, second))
    (lane,) = dbcache.summary(model, logging=False).lanes
    assert lane.cached_steps
    full = lane.cached_steps[0]
    assert all(map(torch.equal, first[:full], plain[:full]))
    dbcache.disable(model)
    assert all(map(torch.equal, tiny.denoise(model, FAMILY, 8), plain))


def test_a_request_under_way_starts_from_the_new_weights():
    model = dbcache.enable(tiny.wan(layers=4), **CACHED, num_inference_steps=20)
    tiny.denoise(model, FAMILY, 6)
    assert dbcache.summary(model, logging=False).lanes[0].reasons[-1] == "below threshold"
    quantize(model, quant_type="int8_weight_only")
    tiny.denoise(model, FAMILY, 1)
    assert dbcache.summary(model, logging=False).lanes[0].reasons[-1] == "no reference"
    assert "the weights were quantised" in str(dbcache.summary(model, logging=False))


def test_which_layers(caplog):
    model = tiny.wan(layers=2)
    with caplog.at_level(logging.INFO, "dbcache"):
        quantize(
            model,
            quant_type="int8",
            exclude_layers=["ffn"],
            precision_plan={"to_q": "float8_weight_only"},
            verbose=True,
        )
    assert "4 float8_weight_only" in caplog.text
    assert "4 in exclude_layers" in caplog.text
    assert "WanTransformer3DModel.blocks.0.attn1.to_k: int8_per_row" in caplog.text
    assert not any("ffn" in name for name in changed(model))
    assert {kind for name, kind in kinds(model).items() if "to_q" in name} == {"Float8Tensor"}
    quantize(model, quant_type="int8_weight_only")  # what was left out; the rest stays
    assert {kind for name, kind in kinds(model).items() if "to_q" in name} == {"Float8Tensor"}
    assert any("ffn" in name for name in changed(model))
    whole = tiny.wan(layers=2)
    quantize(
        whole, quant_type="int8", regional_quantize=False, filter_fn=lambda m, name: "proj" in name
    )
    assert changed(whole) == {name for name in kinds(whole) if "proj" in name}
    assert "proj_out" in changed(whole)


def test_words_are_whole_and_adapters_stay():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = torch.nn.Linear(8, 8)
            self.lora_A = torch.nn.ModuleDict({"x": torch.nn.Linear(8, 2)})

    model = torch.nn.ModuleDict(
        {"model": Wrapped(), "img_mod": torch.nn.Linear(8, 8), "x_embedder2": torch.nn.Linear(8, 8)}
    )
    quantize(model, quant_type="int8_weight_only")
    assert changed(model) == {"model.base_layer"}


def test_components_of_a_pipeline_each_with_its_type():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipe = tiny.pipeline("flux")
    pipe.text_encoder_2 = T5EncoderModel(config)
    components = {
        "transformer": "int8_weight_only",
        "text_encoder_2": {"quant_type": "float8_weight_only"},
    }
    assert quantize(pipe, components_to_quantize=components) is pipe
    assert set(kinds(pipe.text_encoder_2).values()) == {"Float8Tensor"}
    assert pipe.text_encoder_2(torch.tensor([[1, 2]])).last_hidden_state.isfinite().all()
    blocks = {kind for name, kind in kinds(pipe.transformer).items() if "attn" in name}
    assert blocks == {"Int8Tensor"}
    with pytest.raises(ValueError, match=r"must name modules of the FluxPipeline, \[.*got 'unet'"):
        quantize(pipe, quant_type="int8", components_to_quantize=["unet"])
    with pytest.raises(ValueError, match="names parts of a pipeline, got a FluxTrans"):
        quantize(pipe.transformer, components_to_quantize=["transformer"])


def test_needs_are_checked_before_anything_changes(monkeypatch):
    pipe = tiny.pipeline("wan")
    pipe.transformer.to(torch.bfloat16)
    for kind, needs in TYPES.items():
        if needs.capability is not None and needs.multiple <= 8:
            continue
        if needs.capability is not None:
            wide = torch.nn.Sequential(torch.nn.Linear(128, 128)).to(torch.bfloat16)
            with pytest.raises(RuntimeError, match=rf"{kind} needs an NVIDIA GPU .*got no GPU"):
                quantize(wide, quant_type=kind, exclude_layers=[])
            assert changed(wide) == set()
    odd = torch.nn.Sequential(torch.nn.Linear(24, 20))
    with pytest.raises(ValueError, match=r"multiples of 16, got \['0 \(20, 24\) torch.float32'\]"):
        quantize(odd, quant_type="nvfp4_weight_only")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
    with pytest.raises(RuntimeError, match=r"8\.9 or later, got one of capability 8\.0"):
        quantize(torch.nn.Linear(16, 16), quant_type="float8_per_tensor")
    with pytest.raises(ImportError, match="mslk must be installed for int4_weight_only"):
        quantize(torch.nn.Linear(128, 128).to(torch.bfloat16), quant_type="int4")
    plans = dbcache.quantization.plan
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    mixed = torch.nn.Sequential(
        torch.nn.Linear(128, 128), torch.nn.Linear(128, 48), torch.nn.Linear(48, 5)
    )
    (part,) = plans(mixed, quant_type="float8_per_block").parts
    assert part.types == {"0": "float8_per_block", "1": "float8_per_tensor"}
    (part,) = plans(mixed, quant_type="float8_per_block", per_tensor_fallback=False).parts
    assert part.types == {"0": "float8_per_block"}


def test_what_cannot_be(monkeypatch):
    model = tiny.wan(layers=2)
    for options, error, text in (
        ({"quant_type": "svdq_int4_r32"}, ValueError, "load a Nunchaku model"),
        ({"quant_type": "bitsandbytes_4bit"}, ValueError, "BitsAndBytesConfig"),
        ({"quant_type": "int9"}, ValueError, "must be one of"),
        ({"exclude_layers": "attn"}, TypeError, "must be a list of names"),
        ({"filter_fn": "attn"}, TypeError, "must be a function"),
        ({"quant_typ": "int8"}, TypeError, "did you mean 'quant_type'"),
        ({"precision_plan": {"to_q": "x"}}, ValueError, r"precision_plan\['to_q'\]"),
        ({"quant_type": "int8", "exclude_layers": ["blocks"]}, ValueError, "no linear layer"),
    ):
        with pytest.raises(error, match=text):
            quantize(model, **options)
    model.blocks[0]._hf_hook = type("AlignDevicesHook", (), {})()
    with pytest.raises(ValueError, match="quantise first, then offload"):
        quantize(model, quant_type="int8")
    assert changed(model) == set()
    del model.blocks[0]._hf_hook
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        dbcache.enable(tiny.flux().to(torch.bfloat16), quantize_config=QuantizeConfig())
    import importlib.util as util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(ImportError, match=r"pip install 'dbcache-dit\[quantization\]'"):
        dbcache.enable(model, quantize_config=QuantizeConfig(quant_type="int8"))
    assert not dbcache.is_enabled(model)


def test_in_files(tmp_path):
    section = {"quant_type": "int8_weight_only", "exclude_layers": ["ffn"]}
    path = tmp_path / "cache.json"
    path.write_text(json.dumps({"cache_config": CACHED, "quantize_config": section}))
    assert dbcache.load_quantize_config(path).given == section | {"exclude_layers": ("ffn",)}
    model = dbcache.enable(tiny.wan(layers=3), **dbcache.load_configs(path))
    assert changed(model)
    assert not any("ffn" in name for name in changed(model))
    with pytest.raises(TypeError, match="did you mean 'quant_type'"):
        dbcache.load_configs({"quantize_config": {"quant_typ": "int8"}})


def test_compiled_after():
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = quantize(tiny.wan(layers=3), quant_type="int8_weight_only")
    expected = tiny.denoise(model, FAMILY, 2)
    dbcache.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(tiny.denoise(model, FAMILY, 2), expected)
    assert len(graphs) == 1
