"""Models that come quantised: by diffusers' own configs, GGUF, bitsandbytes, Nunchaku."""

from __future__ import annotations

import copy
import importlib
import sys
import types

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

import dbcache

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

FAMILY = tiny.FAMILIES["flux"]
CACHED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.6}


def in_blocks(model):
    """Yield (owner, name, layer) of the linear layers in blocks."""
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        for owner in block.modules():
            for name, layer in list(owner.named_children()):
                if type(layer) is torch.nn.Linear:
                    yield owner, name, layer


def check(model):
    """The cache caches, its full steps are the model's own, and nothing of it stays."""
    plain = tiny.denoise(model, FAMILY, 6)
    dbcache.enable(model, **CACHED, num_inference_steps=6)
    outputs = tiny.denoise(model, FAMILY, 6)
    cached = dbcache.summary(model, logging=False).lanes[0].cached_steps
    assert cached
    assert all(map(torch.equal, outputs[: cached[0]], plain[: cached[0]]))
    assert not torch.equal(outputs[-1], plain[-1])
    dbcache.disable(model)
    assert all(map(torch.equal, tiny.denoise(model, FAMILY, 6), plain))


def test_torchao_through_diffusers(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    tiny.flux(double=2, single=3).save_pretrained(tmp_path)
    config = TorchAoConfig(
        quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["proj_out", "x_embedder"]
    )
    model = FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=config)
    layer = model.transformer_blocks[0].attn.to_q
    assert type(layer.weight.data) is not torch.Tensor
    check(model)
    before = layer.weight
    dbcache.quantize(model, quant_type="int8", exclude_layers=[])  # is quantised already
    assert layer.weight is before


def test_gguf():
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    model = tiny.flux(double=2, single=3)
    expected = tiny.denoise(model, FAMILY, 1)
    for owner, name, layer in in_blocks(model):
        kind = gguf.GGMLQuantizationType.Q8_0
        codes = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), kind))
        new = GGUFLinear(layer.in_features, layer.out_features, True, compute_dtype=torch.float32)
        new.weight, new.bias = GGUFParameter(codes, quant_type=kind), layer.bias
        setattr(owner, name, new)
    error = tiny.denoise(model, FAMILY, 1)[0] - expected[0]
    assert 0 < error.abs().max() < 0.1
    check(model)


def test_bitsandbytes_nf4():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny.flux(double=2, single=3)
    for owner, name, layer in in_blocks(model):
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4"
        )
        new.load_state_dict(layer.state_dict())
        setattr(owner, name, new.to("cpu"))
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.uint8
    check(model)


def test_nunchaku_lite_through_diffusers(monkeypatch):
    from diffusers import NunchakuLiteQuantizationConfig

    # its kernels need a GPU, and a download: the layers as they were stand in for them below
    kernels = types.SimpleNamespace(get_kernel=lambda *_, **__: types.SimpleNamespace(ops=None))
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr("diffusers.utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("diffusers.utils.is_kernels_version", lambda *_: False)
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    utils = importlib.import_module("diffusers.quantizers.nunchaku.utils")
    monkeypatch.delitem(sys.modules, utils.__name__)
    model = tiny.flux(double=2, single=3)
    names = {id(layer): name for name, layer in model.named_modules()}
    layers = [(names[id(layer)], copy.deepcopy(layer)) for _, _, layer in in_blocks(model)]
    layers = [(name, layer) for name, layer in layers if "attn" in name]
    targets = {"targets": [name for name, _ in layers], "precision": "nvfp4"}
    config = NunchakuLiteQuantizationConfig(svdq_w4a4={**targets, "group_size": 16, "rank": 8})
    assert utils.replace_with_nunchaku_linear(model, config.to_dict(), torch.float32) == len(layers)
    twins = {id(model.get_submodule(name)): layer for name, layer in layers}
    monkeypatch.setattr(utils.SVDQW4A4Linear, "forward", lambda self, x: twins[id(self)](x))
    check(model)


class NunchakuFluxTransformerBlock(FluxTransformerBlock):
    """Stands in for Nunchaku's: the same base, arguments and outputs."""


class NunchakuFluxTransformer2DModelV2(FluxTransformer2DModel):
    """Stands in for Nunchaku's second version, whose blocks are modules of diffusers' classes."""

    def __init__(self, **config):
        super().__init__(**config)
        for block in self.transformer_blocks:
            block.__class__ = NunchakuFluxTransformerBlock


class AllBlocks(torch.nn.Module):
    """Stands in for the module in which Nunchaku's first version runs all blocks."""

    def forward(self, hidden_states, encoder_hidden_states, **_):
        return encoder_hidden_states, hidden_states


class NunchakuFluxTransformer2dModel(FluxTransformer2DModel):
    """Stands in for Nunchaku's first version."""

    def __init__(self, **config):
        super().__init__(**config)
        self.transformer_blocks = torch.nn.ModuleList([AllBlocks()])
        self.single_transformer_blocks = torch.nn.ModuleList([])


def test_nunchaku_v2_is_found_by_its_base_and_v1_refused():
    config = dict(tiny.flux(double=2, single=3).config)
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    check(tiny.fill(NunchakuFluxTransformer2DModelV2(**config), seed=0))
    pipe = tiny.pipeline("flux")
    pipe.transformer = NunchakuFluxTransformer2dModel(**config)
    for target in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match=r"runs all blocks inside of one module.*V2"):
            dbcache.enable(target)
    assert isinstance(tiny.flux().single_transformer_blocks[0], FluxSingleTransformerBlock)
