"""What cannot be spread beside the transformer is refused; see `checks_extras_two.py`, too."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import spread
import tiny
import torch
import torch.distributed as dist
from transformers import CLIPTextConfig, CLIPTextModel

import dbcache
from dbcache.config.parallelism import ParallelismConfig
from dbcache.parallel.extras import _modules
from dbcache.parallel.handle import prepare


def clip(heads: int) -> CLIPTextModel:
    sizes = {"hidden_size": 8 * heads, "intermediate_size": 16, "num_hidden_layers": 1}
    return CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=heads, vocab_size=9))


def union() -> torch.nn.Module:
    config = {k: v for k, v in spread.FLUX_LIKE.items() if k != "num_layers"}
    return diffusers.FluxControlNetModel(
        **config, num_layers=1, num_attention_heads=4, pooled_projection_dim=12, num_mode=2
    )


def offloaded() -> torch.nn.Module:
    encoder = clip(4)
    encoder._hf_hook = object()
    return encoder


REFUSED: list[tuple[Any, dict[str, int], str]] = [
    (lambda: "vae", {}, "names need a pipeline, got 'vae'; pass the module itself"),
    (union, {}, "FluxControlNetModel with num_mode .*leave it out, or use tp_size"),
    (lambda: diffusers.ControlNetModel(**CONTROL), {}, "ControlNetModel has no plan; leave it out"),
    (lambda: clip(2), {}, "the 4 ranks must divide the 2 heads of q_proj"),
    (offloaded, {}, "must be on the cpu of the transformer and stay there"),
    (lambda: torch.nn.Linear(2, 2), {}, "Linear: its weights cannot be spread; leave it out"),
    (
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4,),
            decoder_block_out_channels=(4,),
            num_encoder_blocks=(1,),
            num_decoder_blocks=(1,),
        ),
        {},
        r"AutoencoderTiny: its tiles cannot be told apart; .*enable_tiling\(\); known: .*Wan",
    ),
]
CONTROL = {
    "down_block_types": ("DownBlock2D",),
    "block_out_channels": (4,),
    "norm_num_groups": 2,
    "only_cross_attention": False,
    "cross_attention_dim": 4,
    "attention_head_dim": 2,
}


@pytest.mark.parametrize(("make", "sizes", "text"), REFUSED)
def test_what_cannot_be_spread_is_refused_with_what_to_do(
    make: Any, sizes: dict[str, int], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    model, extra = spread.build("FluxTransformer2DModel", heads=4), make()
    config = ParallelismConfig(ulysses_size=4, extra_parallel_modules=[extra])
    with pytest.raises(ValueError, match=text):
        prepare([model], config)
    with pytest.raises(ValueError, match="FluxTransformer2DModel is the transformer, spread any"):
        prepare([model], ParallelismConfig(ulysses_size=4, extra_parallel_modules=[model]))


def test_names_are_components_and_the_text_encoder_is_the_largest() -> None:
    small, large = clip(2), clip(4)
    parts = {"text_encoder": small, "text_encoder_2": large, "tokenizer": None}
    pipe = SimpleNamespace(components=parts)
    assert list(_modules(["text_encoder", "text_encoder_2", small], pipe)) == [large, large, small]
    with pytest.raises(ValueError, match="got 'vea'; there are text_encoder, text_encoder_2"):
        list(_modules(["vea"], pipe))
    nets = [union(), union()]
    several = diffusers.FluxMultiControlNetModel(nets)
    assert list(_modules([several], None)) == nets


def test_a_list_in_a_file_or_flat_is_kept_and_other_types_are_refused() -> None:
    given = {"ulysses": 2, "parallel_kwargs": {"extra_parallel_modules": ["text_encoder", "vae"]}}
    config = dbcache.load_parallelism_config({"parallelism_config": given})
    assert config.context.extra_parallel_modules == ["text_encoder", "vae"]
    flat = ParallelismConfig(ulysses_size=2, extra_parallel_modules=["vae"])
    assert flat.context.extra_parallel_modules == ["vae"]
    for wrong in ("vae", [3], tiny.flux()):
        with pytest.raises(TypeError, match="extra_parallel_modules must be a list of modules"):
            ParallelismConfig(ulysses_size=2, extra_parallel_modules=wrong)
