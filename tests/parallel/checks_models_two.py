"""Two ranks: every model in every mode gives what one process gives, and is restored."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checks_engines_two
import checks_extras_two
import checks_policies_two
import checks_together_two
import diffusers
import ranks
import spread
import tiny
import torch

import dbcache
from dbcache.config.parallelism import ParallelismConfig
from dbcache.parallel.plans import PLANS

EXACT = 1e-5
MODES: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_size": 2},
    "ring": {"ring_size": 2},
    "ring, gathered": {
        "ring_size": "auto",
        "parallel_kwargs": {"ring_rotate_method": "allgather"},
    },
    "tensor": {"tp_size": 2},
}


def modes_of(name: str) -> dict[str, dict[str, Any]]:
    """Return the modes that a class has a plan for."""
    splits = spread.splits_layers(name)
    return {mode: options for mode, options in MODES.items() if splits or "tp_size" not in options}


def traces(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Return what spreading could leave behind: attributes, objects and numbers."""
    left: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        own = module.__dict__
        numbers = {key: value for key, value in own.items() if isinstance(value, int)}
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        processor = id(getattr(module, "processor", None))
        left.append((name, (sorted(own), numbers, hooks, processor)))
    return left + [(name, id(parameter)) for name, parameter in model.named_parameters()]


def check_models_are_equal_in_every_mode() -> None:
    for name in spread.SUBJECTS:
        model, given = spread.build(name, heads=4), spread.inputs(name, "even")
        whole = spread.step(model, given)
        assert whole.std() > 0.1, f"{name}: its output is too small to compare"
        before, weights = traces(model), {k: v.clone() for k, v in model.state_dict().items()}
        for mode, options in modes_of(name).items():
            with spread.spread(model, **options):
                out = spread.step(model, given)
                assert traces(model) != before
            error = (out - whole).abs().max().item()
            assert error < EXACT, f"{name}, {mode}: off by {error}"
            assert traces(model) == before, f"{name}, {mode}: left a trace"
            assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
            assert torch.equal(spread.step(model, given), whole), f"{name}, {mode}: not restored"


def check_odd_lengths_are_equal() -> None:
    anything = {"experimental_ulysses_anything": True}
    modes = {
        "ulysses": {"ulysses_size": 2, "parallel_kwargs": anything},
        "ring": {"ring_size": 2},
        "ring, gathered": MODES["ring, gathered"],
    }
    for name in spread.SUBJECTS:
        model, given = spread.build(name, heads=3), spread.inputs(name, "odd")
        whole = spread.step(model, given)
        for mode, options in modes.items():
            with spread.spread(model, **options):
                out = spread.step(model, given)
            error = (out - whole).abs().max().item()
            assert error < EXACT, f"{name}, {mode}: off by {error}"


def check_wan_with_pictures_and_a_time_per_token() -> None:
    name = "WanTransformer3DModel"
    config = spread.WAN | {"image_dim": 8, "added_kv_proj_dim": 4 * spread.WIDTH}
    pictures = tiny.fill(diffusers.WanTransformer3DModel(**config, num_attention_heads=4), seed=3)
    given = spread.inputs(name, "even")
    # the model takes the last 512 tokens for text
    text = {"encoder_hidden_states": tiny.noise(2, 512, tiny.TEXT_DIM, seed=11)}
    image = {"encoder_hidden_states_image": tiny.noise(2, 5, 8, seed=12)}
    times = {"timestep": 1000 * torch.linspace(0.1, 1, 32).reshape(2, 16)}
    for model, more in ((pictures, text | image), (spread.build(name, heads=4), times)):
        whole = spread.step(model, given | more)
        for mode, options in MODES.items():
            with spread.spread(model, **options):
                error = (spread.step(model, given | more) - whole).abs().max().item()
            assert error < EXACT, f"{sorted(more)}, {mode}: off by {error}"


def check_residuals_of_a_controlnet_are_split() -> None:
    counts = {"controlnet_block_samples": 2, "controlnet_single_block_samples": 3}
    for name, row in PLANS.items():
        model, given = spread.build(name, heads=4), spread.inputs(name, "even")
        for residuals in row.residuals:
            shape = (*given["hidden_states"].shape[:2], 4 * spread.WIDTH)
            given[residuals] = [
                tiny.noise(*shape, seed=seed) for seed in range(41, 41 + counts[residuals])
            ]
        if not row.residuals:
            continue
        whole = spread.step(model, given)
        plain = spread.step(model, spread.inputs(name, "even"))
        assert (plain - whole).abs().max() > 0.1, f"{name}: the residuals have no effect"
        for options in ({"ulysses_size": 2}, {"ring_size": 2}):
            with spread.spread(model, **options):
                error = (spread.step(model, given) - whole).abs().max().item()
            assert error < EXACT, f"{name}, {options}: off by {error}"


def check_exchanges_behind_projections_are_equal() -> None:
    for length, heads in (("even", 4), ("odd", 3)):
        kwargs = {"experimental_ulysses_async": True, "experimental_ulysses_anything": True}
        names = [name for name, row in PLANS.items() if row.projections]
        assert len(names) == 3
        for name in names:
            model, given = spread.build(name, heads), spread.inputs(name, length)
            whole, before = spread.step(model, given), traces(model)
            with spread.spread(model, ulysses_size=2, parallel_kwargs=kwargs):
                out = spread.step(model, given)
            error = (out - whole).abs().max().item()
            assert error < EXACT, f"{name}, {length}: off by {error}"
            assert traces(model) == before, f"{name}: left a trace"


def check_float8_is_close() -> None:
    options = {"ulysses_size": 2, "parallel_kwargs": {"experimental_ulysses_float8": True}}
    for name in spread.SUBJECTS:
        model, given = spread.build(name, heads=4), spread.inputs(name, "even")
        whole = spread.step(model, given)
        with spread.spread(model, **options):
            out = spread.step(model, given)
        error = ((out - whole).norm() / whole.norm()).item()
        # 3 bits of mantissa: an element is off by 1/16 at most, by about 1/40 on average
        assert 1e-4 < error < 0.1, f"{name}: off by {error}"


def generated(name: str, **more: Any) -> tuple[list[Any], list[torch.Tensor]]:
    """Return the decisions and the latents of a pipeline's call with the cache on."""
    pipe = tiny.pipeline(name)
    config = dbcache.DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.22
    )
    dbcache.enable(pipe, config, **more)
    latents = tiny.generate(pipe, 8)
    lanes = [(x.transformer, x.branch, x.reasons) for x in dbcache.summary(pipe).lanes]
    assert any(lane.cached_steps for lane in dbcache.summary(pipe).lanes), f"{name}: no step cached"
    dbcache.disable(pipe)
    assert "_dbcache" not in pipe.__dict__
    return lanes, latents


def check_pipelines_with_guidance() -> None:
    for name in ("flux", "qwen", "wan", "wan2.2"):
        lanes, latents = generated(name)
        for options in ({"ulysses_size": 2}, {"tp_size": 2})[: 1 + (name == "wan2.2")]:
            found, others = generated(name, parallelism_config=ParallelismConfig(**options))
            assert found == lanes, f"{name}, {options}: {found} instead of {lanes}"
            error = max((a - b).abs().max().item() for a, b in zip(latents, others, strict=True))
            assert error < 1e-4, f"{name}, {options}: off by {error}"


def check_guidance_over_ranks() -> None:
    """Each rank runs one of two branches, and both go on with the same latents."""
    config = ParallelismConfig(cfg_size=2)
    for name in ("flux", "qwen", "wan", "wan2.2"):
        for guided in (True, False)[: 1 + (name == "flux")]:
            calls, latents = [], []
            for options in ({}, {"parallelism_config": config}):
                pipe, runs = tiny.pipeline(name), []
                parts = [pipe.transformer, getattr(pipe, "transformer_2", None)]
                for part in parts[: 1 + (name == "wan2.2")]:
                    first = getattr(part, "transformer_blocks", getattr(part, "blocks", None))[0]
                    first.register_forward_pre_hook(lambda *_, runs=runs: runs.append(None))
                dbcache.enable(pipe, Fn_compute_blocks=1, max_warmup_steps=2, **options)
                latents.append(tiny.generate(pipe, 8, guided=guided))
                latents.append(tiny.generate(pipe, 8, guided=guided, seed=6))
                calls.append(len(runs))
                dbcache.disable(pipe)
            error = max(
                (a - b).abs().max().item()
                for alone, spread_out in zip(latents[:2], latents[2:], strict=True)
                for a, b in zip(alone, spread_out, strict=True)
            )
            assert error == 0, f"{name}: off by {error}"
            # both branches on the first step of each request and transformer, then one
            both = 2 * len(parts[: 1 + (name == "wan2.2")])
            expected = [32, 16 + both] if guided else [16, 16]
            assert calls == expected, f"{name}: {calls} calls instead of {expected}"


def check_the_example_runs() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "examples" / "parallel.py"
    example = SimpleNamespace(**runpy.run_path(str(path)))
    options = example.parse(["flux", "--ulysses", "2", "--steps", "6", "--threshold", "0.5"])
    text = {
        "prompt_embeds": tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=11),
        "pooled_prompt_embeds": tiny.noise(1, 12, seed=12),
    }
    report = example.compare(tiny.pipeline("flux"), text | {"height": 64, "width": 64}, options)
    assert report["parallelism"] == "Ulysses2"
    assert 10 < float(report["PSNR of the latents"].removesuffix(" dB")) < 90
    for model in example.MODELS.values():
        assert hasattr(diffusers, model.pipeline)


if __name__ == "__main__":
    files = (checks_engines_two, checks_extras_two, checks_policies_two, checks_together_two)
    ranks.main({name: check for file in files for name, check in vars(file).items()} | globals())
