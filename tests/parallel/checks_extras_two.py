"""Two ranks: text encoders, VAEs and ControlNets give what one process gives, and are restored."""

from typing import Any

import diffusers
import pipelines
import pytest
import spread
import tiny
import torch
import torch.distributed as dist
import transformers
from transformers import AutoConfig

import dbcache
from dbcache.config.parallelism import ParallelismConfig
from dbcache.parallel import controlnets, tiles
from dbcache.parallel.text_encoders import ATTENTIONS

EXACT = 1e-5
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "depth": 1,
    "out_hidden_size": 32,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "T5EncoderModel": {
        "model_type": "t5",
        "vocab_size": 40,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
    "UMT5EncoderModel": {
        "model_type": "umt5",
        "vocab_size": 40,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    },
    "CLIPTextModel": {"model_type": "clip_text_model", **TEXT},
    "Qwen2Model": {"model_type": "qwen2", **TEXT},
    "Qwen2VLTextModel": {"model_type": "qwen2_vl_text", **TEXT, "rope_parameters": MROPE},
    "Qwen3Model": {"model_type": "qwen3", **TEXT},
    "Qwen3VLTextModel": {"model_type": "qwen3_vl_text", **TEXT, "rope_parameters": MROPE},
    "GemmaModel": {"model_type": "gemma", **TEXT},
    "LlamaModel": {"model_type": "llama", **TEXT},
    "MistralModel": {"model_type": "mistral", **TEXT},
    "Gemma2Model": {"model_type": "gemma2", **TEXT},
    "Gemma3TextModel": {"model_type": "gemma3_text", **TEXT},
    "GlmModel": {"model_type": "glm", **TEXT},
    "SmolLM3Model": {"model_type": "smollm3", **TEXT},
    "Qwen2_5_VLForConditionalGeneration": {
        "model_type": "qwen2_5_vl",
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": VISION,
    },
}


def encoder(name: str) -> torch.nn.Module:
    """Return a tiny text encoder with weights of its own."""
    given = dict(ENCODERS[name])
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    return tiny.fill(getattr(transformers, name)(config), seed=3).eval()


def encoded(model: torch.nn.Module) -> torch.Tensor:
    """Return its last hidden states for two prompts, one of them padded."""
    ids = torch.tensor([[3, 5, 7, 11, 13, 17], [19, 23, 29, 0, 0, 0]])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
    return out.hidden_states[-1]


def extras(*modules: Any, **sizes: int) -> ParallelismConfig:
    sizes = sizes or {"ulysses_size": 2}
    return ParallelismConfig(**sizes, parallel_kwargs={"extra_parallel_modules": list(modules)})


def check_text_encoders() -> None:
    seen: set[str] = set()
    for name in ENCODERS:
        model = encoder(name)
        seen |= {type(part).__name__ for part in model.modules()}
        whole = encoded(model)
        before = traces(model)  # after the first call, at which transformers adds hooks of its own
        count = sum(parameter.numel() for parameter in model.parameters())
        flux = tiny.flux()
        dbcache.enable(flux, parallelism_config=extras(model))
        held = sum(
            p.to_local().numel() if hasattr(p, "to_local") else p.numel()
            for p in model.parameters()
        )
        error = (encoded(model) - whole).abs().max().item()
        assert error < EXACT * whole.abs().max(), f"{name}: off by {error}"
        assert held < 0.85 * count, f"{name}: {held} of {count} weights are on a rank"
        dbcache.disable(flux)
        left = [pair for pair in zip(before, traces(model), strict=True) if pair[0] != pair[1]]
        assert not left, f"{name}: left {left}"
        assert torch.equal(encoded(model), whole), f"{name}: not restored"
    assert seen >= set(ATTENTIONS), f"not compared: {set(ATTENTIONS) - seen}"


KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}
FOUR = {"block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1}
WAN = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
}
BLOCKS = {"encoder_block_types": ("ResBlock",) * 2, "decoder_block_types": ("ResBlock",) * 2}
DC = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
DC |= {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
DC |= {f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")}
VAES: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "AutoencoderDC": (
        {"in_channels": 3, "latent_channels": 4, "attention_head_dim": 4} | BLOCKS | DC,
        2,
        (1, 4, 6, 7),
    ),
    "AutoencoderKL": (KL, 2, (2, 4, 6, 7)),
    "AutoencoderKLFlux2": (KL, 2, (1, 4, 6, 7)),
    "AutoencoderKLHunyuanVideo": (FOUR | {"norm_num_groups": 4}, 8, (1, 4, 1, 6, 7)),
    "AutoencoderKLLTX2Video": (
        {
            **FOUR,
            "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": (1,) * 5,
            "decoder_layers_per_block": (1,) * 4,
            "decoder_spatial_padding_mode": "zeros",
        },
        32,
        (1, 4, 1, 5, 5),
    ),
    "AutoencoderKLLTXVideo": (
        {
            **FOUR,
            "decoder_block_out_channels": (8,) * 4,
            "layers_per_block": (1,) * 5,
            "decoder_layers_per_block": (1,) * 5,
        },
        32,
        (1, 4, 1, 5, 5),
    ),
    "AutoencoderKLQwenImage": (WAN, 2, (1, 4, 1, 6, 7)),
    "AutoencoderKLWan": (WAN | {"scale_factor_spatial": 2}, 2, (1, 4, 3, 6, 7)),
}


def tiled(name: str) -> torch.nn.Module:
    """Return a tiny VAE whose tiles are four latents wide and overlap by one."""
    config, factor, _ = VAES[name]
    vae = tiny.fill(getattr(diffusers, name)(**config), seed=4).eval()
    sizes = {"tile_overlap_factor": 0.25, "tile_latent_min_size": 4}
    sizes["tile_sample_min_size"] = 4 * factor
    for side in ("height", "width"):
        sizes |= {f"tile_latent_min_{side}": 4, f"tile_sample_min_{side}": 4 * factor}
        sizes[f"tile_sample_stride_{side}"] = 3 * factor
    for attribute, value in sizes.items():
        if hasattr(vae, attribute):
            setattr(vae, attribute, value)
    vae.use_tiling = True
    return vae


def check_vaes() -> None:
    assert sorted(VAES) == list(tiles.VAES)
    for name in VAES:
        vae, latents = tiled(name), tiny.noise(*VAES[name][2], seed=5)
        calls: list[Any] = []
        hook = vae.decoder.conv_out.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        with torch.no_grad():
            picture = vae.decode(latents).sample
            alone, moments = len(calls), encoded_by(vae, picture)
            vae.use_tiling = False
            before, flux = traces(vae), tiny.flux()
            dbcache.enable(flux, parallelism_config=extras(vae))
            calls.clear()
            assert torch.equal(vae.decode(latents).sample, picture), f"{name}: other bits"
            assert abs(2 * len(calls) - alone) <= 1 < len(calls), f"{name}: {len(calls)} of {alone}"
            error = (encoded_by(vae, picture) - moments).abs().max()
            assert error < 1e-6, f"{name}: off by {error}"
        dbcache.disable(flux)
        assert traces(vae) == before, f"{name}: left a trace"
        hook.remove()


def encoded_by(vae: Any, picture: torch.Tensor) -> torch.Tensor:
    out = vae.encode(picture)
    return out.latent if hasattr(out, "latent") else out.latent_dist.parameters


FLUX = {name: spread.FLUX_LIKE[name] for name in spread.FLUX_LIKE if name != "num_layers"}
CONTROLNETS: dict[str, dict[str, Any]] = {
    "FluxControlNetModel": FLUX | {"num_layers": 2, "pooled_projection_dim": 12},
    "QwenImageControlNetModel": spread.SUBJECTS["QwenImageTransformer2DModel"].config
    | {"num_layers": 2},
}


def check_controlnets() -> None:
    """Along the sequence and by weights, even and odd lengths, alone and as one of several."""
    modes: list[tuple[str, dict[str, Any]]] = [
        ("even", {"ulysses_size": 2}),
        ("even", {"tp_size": 2}),
        ("odd", {"ring_size": 2}),
    ]
    assert set(CONTROLNETS) == set(controlnets.CONTROLNETS)
    for name, config in CONTROLNETS.items():
        transformer = name.replace("ControlNetModel", "Transformer2DModel")
        control = tiny.fill(getattr(diffusers, name)(num_attention_heads=4, **config), seed=8)
        for length, sizes in modes:
            given = spread.inputs(transformer, length)
            given |= {"controlnet_cond": tiny.noise(*given["hidden_states"].shape, seed=9)}
            given |= {"return_dict": False}
            whole = residuals(control, given)
            model, before = spread.build(transformer, heads=4), traces(control)
            dbcache.enable(model, parallelism_config=extras(control, **sizes))
            spread_out = residuals(control, given)
            dbcache.disable(model)
            assert len(whole) == len(spread_out) > 1
            for one, other in zip(whole, spread_out, strict=True):
                assert one.std() > 0.01
                error = (one - other).abs().max().item()
                assert error < EXACT, f"{name}, {sizes}, {length}: off by {error}"
            assert traces(control) == before, f"{name}: left a trace"


def check_a_pipeline_with_a_name_for_each_kind() -> None:
    """The image, and the decisions of the cache, are those of one process."""
    seen = []
    for config in (None, extras("controlnet", "vae")):
        pipe = pipelines.build("FLUX.1 ControlNet")
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
        pipe.vae.use_tiling = True
        options = {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.3, "max_warmup_steps": 2}
        dbcache.enable(pipe, parallelism_config=config, **options)
        image = pipelines.draw(pipe, "FLUX.1 ControlNet", guided=True, output_type="pt")
        seen.append((image, pipelines.decisions(pipe), "tiled_decode" in pipe.vae.__dict__))
        dbcache.disable(pipe)
        assert "tiled_decode" not in pipe.vae.__dict__
    assert [shared for _, _, shared in seen] == [False, True]
    assert seen[0][1] == seen[1][1]
    assert any("c" in steps for _, steps in seen[0][1])
    error = (seen[0][0] - seen[1][0]).abs().max().item()
    assert error < 1e-4, f"off by {error}"


def check_ranks_must_agree() -> None:
    """On a list that differs, and when the tiles of one rank fail."""
    rank = dist.get_rank()
    vae, model = tiled("AutoencoderKL"), tiny.flux()
    with pytest.raises(ValueError, match=r"\['AutoencoderKL'\]\} on rank 0 and .* \[\]\} on"):
        dbcache.enable(model, parallelism_config=extras(*[vae][rank:]))
    assert "tiled_decode" not in vae.__dict__
    assert "_dbcache" not in model.__dict__
    dbcache.enable(model, parallelism_config=extras(vae))
    latents = tiny.noise(1, 4, 6, 7, seed=5)

    def fail(*_: Any) -> None:
        raise MemoryError("none left")

    hook = vae.decoder.conv_out.register_forward_hook(fail) if rank else None
    with torch.no_grad():
        error = MemoryError if rank else RuntimeError
        with pytest.raises(error, match="none left" if rank else "rank 1: MemoryError: none left"):
            vae.decode(latents)
        if hook is not None:
            hook.remove()
        with pytest.raises(ValueError, match="must be given the same shape, got"):
            vae.decode(tiny.noise(1, 4, 6, 7 + rank, seed=5))
        vae.decode(latents)
    dbcache.disable(model)


def residuals(control: torch.nn.Module, given: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        found = control(**given)
    return [x for part in found for x in (part if isinstance(part, list | tuple) else [part])]


def traces(model: torch.nn.Module) -> list[tuple[str, Any]]:
    left: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        numbers = {key: v for key, v in module.__dict__.items() if isinstance(v, int)}
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        left.append((name, (sorted(module.__dict__), numbers, hooks)))
    return left + [(name, id(parameter)) for name, parameter in model.named_parameters()]
