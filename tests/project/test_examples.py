"""The scripts in docs/examples run, with tiny models in place of those of the hub."""

import importlib.util
import math
from pathlib import Path

import diffusers
import pytest
import tiny
import torch

import dbcache

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"
ELSEWHERE = {"parallel.py"}
"""Runs on several ranks, in tests/parallel."""

pytestmark = [
    pytest.mark.usefixtures("one_thread", "plain_kernels"),
    pytest.mark.filterwarnings("ignore"),
]


def script(name):
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """Let the hub give tiny models."""

    def pipeline(hub, **options):
        assert options == {"torch_dtype": torch.bfloat16}
        pipe = tiny.pipeline("flux" if "FLUX" in hub else "qwen")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def transformer(hub, **options):
        assert options == {"subfolder": "transformer", "torch_dtype": torch.bfloat16}
        return tiny.flux()

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", pipeline)
    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "from_pretrained", transformer)


def embedded(**more):
    """Return what takes the place of a prompt where there is no text encoder."""
    return {"prompt_embeds": tiny.noise(1, 6, 24, seed=1), "height": 64, "width": 64, **more}


def of_flux():
    return embedded(pooled_prompt_embeds=tiny.noise(1, 12, seed=2))


def test_all_examples_are_run():
    own = Path(__file__).read_text()
    names = {path.name for path in FOLDER.glob("*.py")} - ELSEWHERE
    assert all(f'script("{name.removesuffix(".py")}")' in own for name in names)
    assert len(names) >= 4


def test_transformer_only(capsys):
    arguments = ["black-forest-labs/FLUX.1-dev", "--steps", "10", "--side", "4", "--device", "cpu"]
    latents = script("transformer_only").main(arguments)
    assert torch.isfinite(latents).all()
    said = capsys.readouterr().out
    assert said.count("single_transformer_blocks") >= 2
    assert "10" in said


def test_refresh(capsys):
    mask = torch.ones(1, 6, dtype=torch.bool)
    found = script("refresh").main(
        ["Qwen/Qwen-Image", "--steps", "6", "24", "--device", "cpu"],
        **embedded(prompt_embeds_mask=mask, output_type="latent", true_cfg_scale=1.0),
    )
    assert [summary[0].steps for summary in found] == [6, 24, 24]
    assert found[2][0].counts["warm-up"] == 10
    assert found[2][0].options["max_cached_steps"] == 20
    assert capsys.readouterr().out.count("goes on with") == 3


def test_masks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = script("masks").main(
        ["black-forest-labs/FLUX.1-dev", "--steps", "12", "--device", "cpu"],
        **of_flux(),
        output_type="latent",
    )
    assert len(found) == 8
    said = capsys.readouterr().out.splitlines()
    assert set(said) == set(found)
    for mask in ("slow", "ultra"):
        steps = dbcache.steps_mask(total_steps=12, mask_policy=mask)
        digits = "".join(map(str, steps))
        (name,) = (name for name in found if f"SCM{digits}_static" in name)
        assert found[name][0].cached_steps == [i for i, full in enumerate(steps) if not full]


def test_timing(capsys):
    rows = script("timing").main(
        ["black-forest-labs/FLUX.1-dev", "--steps", "8", "--repeats", "1", "--device", "cpu"],
        **of_flux(),
    )
    assert capsys.readouterr().out.count("\n") == 2 + len(rows) == 6
    plain, *cached = rows
    assert (plain[1], plain[3], plain[5]) == (0, 1, math.inf)
    model = tiny.flux()
    per_step = 2 * sum(p.numel() for p in model.parameters() if p.ndim == 2)  # per token, at least
    assert 8 * per_step * 6 / 1e12 < plain[4] < 8 * per_step * 64 / 1e12
    for _, share, seconds, _, tflops, quality in cached:
        assert tflops == pytest.approx(plain[4]) if share == 0 else tflops < plain[4]
        assert seconds > 0
        assert quality > 0
    assert cached[-1][1] > 0


def test_quantize(monkeypatch):
    asked = []
    if importlib.util.find_spec("torchao") is None:

        def quantize(module, *, quant_type):
            asked.append((type(module).__name__, quant_type))
            return module

        monkeypatch.setattr(dbcache, "quantize", quantize)
    summary = script("quantize").main(
        ["black-forest-labs/FLUX.1-dev", "--steps", "8", "--device", "cpu"],
        **of_flux(),
        output_type="latent",
    )
    assert summary[0].steps == 8
    assert asked in ([], [("FluxTransformer2DModel", "int8_weight_only")])
