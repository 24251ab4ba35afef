"""Sweeps: cells agree with what the settings do, are resumed, and are shown."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import dbcache
from dbcache.cli import main
from dbcache.demo import digits
from dbcache.demo.quality import psnr as psnr_of
from dbcache.demo.quality import ssim as ssim_of
from dbcache.tuning.pictures import pictures_of, psnr, similarity

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "mild": {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.2, "max_warmup_steps": 2},
    "wild": {
        "steps_computation_mask": [1, 1, 0, 0, 0, 1, 0, 0],
        "steps_computation_policy": "static",
        "static_skip_probe": True,
    },
}
OTHER = {"policy": "easycache", "residual_diff_threshold": 0.2, "max_warmup_steps": 2}


@pytest.fixture(scope="module")
def pipe():
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Drawing:
    """Draws two digits in eight steps, and counts how often."""

    def __init__(self, seed):
        self.seed, self.calls = seed, 0

    def __call__(self, pipe):
        self.calls += 1
        generator = torch.Generator().manual_seed(self.seed)
        call = {"num_inference_steps": 8, "generator": generator}
        return digits.decode(pipe(**digits.prompt([3, self.seed]), **call).images)


def test_cells_say_what_the_settings_do_and_are_not_measured_twice(pipe, tmp_path):
    path, draws = tmp_path / "sweep.json", [Drawing(1), Drawing(4)]
    results = dbcache.sweep(pipe, draws, SETTINGS, path=path, progress=False)
    assert not dbcache.is_enabled(pipe)
    by_name = {result.name: result for result in results}
    wild = by_name["wild"]
    assert wild.cached == 5 / 8
    assert wild.bound == pytest.approx(8 / 3)
    assert wild.draws == 2
    plain = [draw(pipe) for draw in draws]
    dbcache.enable(pipe, **SETTINGS["wild"])
    cached = [draw(pipe) for draw in draws]
    dbcache.disable(pipe)
    assert wild.psnr == pytest.approx(psnr_of(torch.cat(cached), torch.cat(plain)), rel=1e-5)
    assert wild.ssim == pytest.approx(ssim_of(torch.cat(cached), torch.cat(plain)), rel=1e-5)
    before = [draw.calls for draw in draws]
    again = dbcache.sweep(pipe, draws, SETTINGS, path=path, progress=False)
    assert [draw.calls for draw in draws] == before
    assert again == results
    dbcache.sweep(pipe, draws, SETTINGS | {"easy": OTHER}, path=path, progress=False)
    assert [draw.calls for draw in draws] == [n + 2 for n in before]
    assert len(json.loads(path.read_text())["cells"]) == 6


def test_the_table_has_lines_to_copy_and_the_plot_a_point_each(pipe, tmp_path):
    results = dbcache.sweep(pipe, [Drawing(2)], [*SETTINGS.values(), OTHER], progress=False)
    text = dbcache.sweep_table(results)
    lines = [line.split("#")[0].strip() for line in text.splitlines() if "dbcache.enable" in line]
    assert len(lines) == 3
    for line in lines:
        exec(line, {"dbcache": dbcache, "pipe": pipe})
        assert dbcache.is_enabled(pipe)
        dbcache.disable(pipe)
    results[0] = replace(results[0], speedup=0.6)  # slower than without the cache
    dbcache.sweep_plot(results, tmp_path / "plot.svg")
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    circles = drawn.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 3
    ordered = sorted(results, key=lambda result: result.psnr)
    heights = {float(c.get("cx")): float(c.get("cy")) for c in circles}
    assert len(heights) == len(ordered)
    assert all(0 < float(c.get("cx")) < 860 and 0 < float(c.get("cy")) < 480 for c in circles)


def test_compare_measures_one_setting(pipe):
    result = dbcache.compare(pipe, Drawing(0), settings=SETTINGS["wild"], progress=False)
    assert result.cached == 5 / 8
    assert 15 < result.psnr < 60


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ([], ValueError, "at least one"),
        ("policy", TypeError, "a mapping or a list"),
        ([3], TypeError, "each setting must be a mapping"),
        ([OTHER, OTHER], ValueError, "twice"),
    ],
)
def test_settings_that_are_none_are_refused(pipe, settings, error, text, tmp_path):
    with pytest.raises(error, match=text):
        dbcache.sweep(pipe, Drawing(0), settings, progress=False)
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(ValueError, match="choose another path"):
        dbcache.sweep(pipe, Drawing(0), [OTHER], path=other, progress=False)


def test_a_draw_that_is_not_the_same_twice_is_refused(pipe):
    draws = iter(range(100))

    def unseeded(pipe):
        return Drawing(next(draws))(pipe)

    with pytest.raises(RuntimeError, match="the same picture each time"):
        dbcache.tune(pipe, [unseeded] * 3, full_steps=4, budget_minutes=0.02, progress=False)


def test_outputs_of_any_kind_are_pictures():
    array = np.random.default_rng(0).random((2, 8, 9, 3)).astype(np.float32)
    images = [Image.fromarray((x * 255).astype(np.uint8)) for x in array]
    exact = pictures_of(array)
    for output in (torch.from_numpy(array), [*array], type("Out", (), {"images": images})()):
        got = pictures_of(output)
        assert len(got) == 2
        for x, y in zip(got, exact, strict=True):
            assert (x - y).abs().max() <= 1 / 255
    video = pictures_of(type("Out", (), {"frames": [images]})())
    assert [tuple(x.shape) for x in video] == [(2, 8, 9, 3)]
    assert psnr(exact[0], exact[0]) == math.inf
    moved = exact[0] + 0.1
    assert psnr(moved, exact[0]) == pytest.approx(20, abs=1e-3)
    latents = 10 * torch.randn(4, 5, 6)
    width = (latents.max() - latents.min()).item()
    assert psnr(latents + 0.1 * width, latents) == pytest.approx(20, abs=1e-3)
    assert math.isnan(similarity(latents, latents))
    assert similarity(exact[0], exact[0]) == pytest.approx(1)
    with pytest.raises(TypeError, match="must return pictures"):
        pictures_of(None)


def test_what_the_command_line_refuses(capsys):
    assert main(["tune", "nowhere/model", "--prompt", "a"]) == 1
    assert main(["tune", "nowhere/model"]) == 1
    assert "--prompt or --prompts must be given" in capsys.readouterr().err
