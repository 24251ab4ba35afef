"""`dbcache.calibrate`: what it notes, what it writes, and what is made of it."""

import json
from dataclasses import replace

import inside
import numpy
import pytest
import torch
from engines import drive, options
from policy_engines import BASE, CALIBRATED, STEPS, calibration, entry, run_both
from tiny import BRANCHES, FAMILIES, denoise, generate, pipeline

import dbcache
from dbcache.config.calibration import _MODELS, PUBLISHED, checkpoint_of

pytestmark = pytest.mark.usefixtures("one_thread")

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def test_a_calibration_is_written_read_and_decides_as_the_oracle(tmp_path):
    family, path = FAMILIES["wan"], tmp_path / "wan.json"
    for policy in CALIBRATED:
        model = family.build()
        plain = denoise(model, family, STEPS, branches=BRANCHES)
        with dbcache.calibrate(
            model, policy=policy, path=path, enable_separate_cfg=True
        ) as content:
            assert content == {}
            outputs = denoise(model, family, STEPS, branches=BRANCHES)
            assert all(map(torch.equal, outputs, plain))
        assert json.loads(path.read_text()) == content
        assert (content["policy"], content["model"]) == (policy, "WanTransformer3DModel")
        assert content["steps"] == STEPS
        assert set(content["versions"]) == {"dbcache", "diffusers", "torch"}
        rule = replace(BASE, policy=policy, enable_separate_cfg=True)
        expected = run_both(family, rule, content=content)
        dbcache.enable(model, cache_config=dbcache.DBCacheConfig(**options(rule)), calibration=path)
        outputs = drive(model, family, rule, STEPS)
        assert all(map(torch.equal, outputs, expected.outputs))
        dbcache.disable(model)


@families
def test_magcache_ratios_are_those_of_the_residuals(family):
    model, residuals = family.build(), []
    blocks = [block for name in family.lists for block in getattr(model, name)]
    at = 1 if family.encoder_first else slice(None)

    def keep_input(_, args, kwargs):
        residuals.append(kwargs.get("hidden_states", args[0] if args else None).double())

    def keep_residual(_, __, output):
        residuals[-1] = (output[at] if family.encoder_first else output).double() - residuals[-1]

    hooks = [blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    hooks.append(blocks[-1].register_forward_hook(keep_residual))
    denoise(model, family, STEPS)
    for hook in hooks:
        hook.remove()
    norms = [residual.norm(dim=-1) for residual in residuals]
    expected = [1.0] + [(a / b).mean().item() for a, b in zip(norms[1:], norms[:-1], strict=True)]
    assert entry(calibration(family.name, "magcache"))["ratios"][""] == pytest.approx(
        expected, rel=1e-5
    )


def test_teacache_fits_how_the_output_follows(monkeypatch):
    seen = {}

    def fit(x, y, degree):
        seen["x"], seen["y"], seen["degree"] = x, y, degree
        return numpy.array([0.0, 0.0, 0.0, 2.0, 0.5])

    monkeypatch.setattr(numpy, "polyfit", fit)
    family = FAMILIES["wan"]
    model, times = family.build(), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: times.append(args[2].double()))
    with dbcache.calibrate(model, policy="teacache", enable_separate_cfg=False) as content:
        runs = [denoise(model, family, 8, seed=seed) for seed in (5, 6)]
    assert len(times) == 16
    assert seen["degree"] == 4
    outputs = [output.double() for run in runs for output in run]

    def changes(values):  # of one request after the other: the time that runs back tells them apart
        pairs = [(values[i], values[i - 1]) for i in range(1, 16) if i != 8]
        return [((a - b).abs().mean() / b.abs().mean()).item() for a, b in pairs]

    assert seen["x"] == pytest.approx(changes(times), rel=1e-4)
    assert seen["y"] == pytest.approx(changes(outputs), rel=1e-4)
    assert entry(content)["coefficients"] == [0.0, 0.0, 0.0, 2.0, 0.5]


def test_several_requests_are_averaged():
    pipe, seeds = pipeline("flux"), (5, 6)
    single = []
    for seed in seeds:
        with dbcache.calibrate(pipe, policy="magcache") as content:
            generate(pipe, 6, seed=seed, guided=False)
        single.append(entry(content)["ratios"]["cond"])
    with dbcache.calibrate(pipe, policy="magcache") as content:
        for seed in seeds:
            generate(pipe, 6, seed=seed, guided=False)
    mean = [(a + b) / 2 for a, b in zip(*single, strict=True)]
    assert entry(content)["ratios"]["cond"] == pytest.approx(mean, rel=1e-6)
    assert content["steps"] == 6


def test_calibrate_says_what_is_wrong(tmp_path):
    pipe, path = pipeline("flux"), tmp_path / "x.json"

    def calibrated(*requests, error=None):
        with dbcache.calibrate(pipe, policy="magcache", path=path):
            for steps in requests:
                generate(pipe, steps)
            if error:
                raise error

    with pytest.raises(ValueError, match=r"calibrate: policy must be one of .*, got 'easycache'"):
        dbcache.calibrate(pipe, policy="easycache").__enter__()
    with pytest.raises(TypeError, match="calibrate: unknown option 'num_steps'; did you mean"):
        dbcache.calibrate(pipe, policy="magcache", num_steps=3).__enter__()
    with pytest.raises(FileNotFoundError, match=r"folder of path must exist, got .*/no/x.json"):
        dbcache.calibrate(pipe, policy="magcache", path=tmp_path / "no" / "x.json").__enter__()
    with pytest.raises(RuntimeError, match=r"must have run two steps or more, got none; call the"):
        calibrated()
    with pytest.raises(ValueError, match=r"as many steps, got \[4, 6\]; calibrate each by itself"):
        calibrated(4, 6)
    with (
        pytest.raises(ValueError, match="needs at least 10 steps after the first, got 6"),
        dbcache.calibrate(pipe, policy="teacache", path=path),
    ):
        generate(pipe, 4)
    with pytest.raises(RuntimeError, match="the user's own"):
        calibrated(4, error=RuntimeError("the user's own"))
    with pytest.raises(ValueError, match=r"must have one transformer, got 2; calibrate each by"):
        dbcache.calibrate(pipeline("wan2.2"), policy="magcache").__enter__()
    assert not path.exists()
    assert "_dbcache" not in vars(pipe)
    dbcache.enable(pipe)
    with pytest.raises(RuntimeError, match="the cache must be off, got an enabled one; disable"):
        dbcache.calibrate(pipe, policy="magcache").__enter__()


def test_two_transformers_are_calibrated_one_by_one():
    pipe = pipeline("wan2.2")
    plain = generate(pipe, 24)
    with (
        dbcache.calibrate(pipe.transformer, policy="magcache") as high,
        dbcache.calibrate(pipe.transformer_2, policy="magcache") as low,
    ):
        assert all(map(torch.equal, generate(pipe, 24), plain))
    assert high["steps"] + low["steps"] == 24
    assert set(entry(high)["ratios"]) == set(BRANCHES)
    modifiers = [
        dbcache.ParamsModifier(cache_config=dbcache.DBCacheConfig(calibration=content))
        for content in (high, low)
    ]
    settings = {"policy": "magcache", "max_warmup_steps": 2, "residual_diff_threshold": 0.1}
    dbcache.enable(pipe, params_modifiers=modifiers, **settings)
    generate(pipe, 24)
    lanes = dbcache.summary(pipe).lanes
    assert len(lanes) == 4
    assert all(lane.cached_steps for lane in lanes)


def test_calibrations_of_something_else_are_refused(tmp_path):
    model, content = FAMILIES["flux"].build(), calibration("flux", "magcache")
    others = {
        "policy 'magcache', got one of 'teacache'": {**content, "policy": "teacache"},
        "model 'FluxTransformer2DModel', got one of 'Other'": {**content, "model": "Other"},
        r"stack 'transformer_blocks\+single_transformer_blocks', got \['blocks'\]": {
            **content,
            "stacks": {"blocks": entry(content)},
        },
        "ratios must be a list of numbers per branch, got None": {
            **content,
            "stacks": {name: {"coefficients": [1.0]} for name in content["stacks"]},
        },
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            dbcache.enable(model, policy="magcache", calibration=other)
    path = tmp_path / "damaged.json"
    for damage, message in (
        (b"{", "JSON, got Exp"),
        (b"[" * 200_000, "JSON of a few levels, got a deeply nested one"),
        ("é".encode("latin-1"), "text in UTF-8, got 'utf-8' codec .*; save it so"),
    ):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=rf"calibration: .*damaged.json must be {message}"):
            dbcache.enable(model, policy="magcache", calibration=path)
    with pytest.raises(TypeError, match=r"calibration must be a string, a path, .* got 3"):
        dbcache.DBCacheConfig(calibration=3)
    wrong = {**content, "policy": "teacache"}
    with pytest.raises(ValueError, match="coefficients must be 5 numbers, got None"):
        dbcache.enable(model, policy="teacache", calibration=wrong)
    assert "forward" not in vars(model)


def test_published_polynomials_are_chosen_by_class_and_config(monkeypatch):
    model = dbcache.enable(FAMILIES["flux"].build(), policy="teacache")
    assert PUBLISHED.keys() == _MODELS.keys()
    (stack,) = inside.stacks(model)
    assert stack.settings.calibration.coefficients == PUBLISHED["FLUX.1-dev"]
    with pytest.raises(ValueError, match="WanTransformer3DModel must have a calibration, got None"):
        dbcache.enable(FAMILIES["wan"].build(), policy="teacache")
    for heads, layers, name in ((12, 30, "Wan2.1-T2V-1.3B"), (40, 40, "Wan2.1-T2V-14B")):
        config = {"num_attention_heads": heads, "num_layers": layers, "in_channels": 16}
        big = type("WanTransformer3DModel", (), {"config": config})()
        assert checkpoint_of(big) == name
        monkeypatch.setitem(_MODELS, name, ("another class", {}))
        assert checkpoint_of(big) is None  # no other one fits
