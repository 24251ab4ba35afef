"""The trained model: it loads, draws digits that can be read, and keeps its quality when cached."""

import json

import pytest
import torch

import dbcache
from dbcache.demo import digits
from dbcache.demo.quality import DigitClassifier, psnr
from dbcache.demo.run import run


@pytest.fixture(scope="module")
def pipe():
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, per_digit=2, steps=50, guidance=1.0):
    classes = list(range(10)) * per_digit
    generator = torch.Generator().manual_seed(7)
    arguments = digits.prompt(classes, guidance=guidance)
    tokens = pipe(**arguments, num_inference_steps=steps, generator=generator).images
    return digits.decode(tokens), torch.tensor(classes)


def test_weights_are_small_and_the_model_is_a_real_one(pipe):
    files = list(digits.WEIGHTS.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 12e6
    config = pipe.transformer.config
    assert config.num_layers >= 2
    assert config.num_layers + config.num_single_layers >= 12


def test_images_survive_packing():
    images = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(digits.decode(digits.encode(images)), images)


def test_rejects_prompts_that_are_not_digits():
    with pytest.raises(ValueError, match=r"from 0 to 9, got \[10, -1\]"):
        digits.prompt([3, 10, -1])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_samples_can_be_read(pipe, guidance):
    images, classes = draw(pipe, per_digit=4, steps=12, guidance=guidance)
    assert DigitClassifier().accuracy(images, classes) >= 0.9


def test_cached_pictures_stay_close_to_the_uncached(pipe):
    plain, _ = draw(pipe)
    dbcache.enable(
        pipe,
        dbcache.DBCacheConfig(
            Fn_compute_blocks=1,
            max_warmup_steps=4,
            max_continuous_cached_steps=3,
            residual_diff_threshold=0.2,
        ),
        dbcache.TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    try:
        cached, _ = draw(pipe)
        (lane,) = dbcache.summary(pipe).lanes
    finally:
        dbcache.disable(pipe)
    assert len(lane.cached_steps) >= 30
    assert psnr(cached, plain) >= 48


def test_demo_writes_its_picture_and_table(tmp_path, capsys):
    records = run(tmp_path, steps=12, per_digit=1, repeats=1, seed=0, device="cpu")
    assert (tmp_path / "digits.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "digits.json").read_text())[0]["setting"] == "uncached"
    printed = capsys.readouterr().out
    for record in records:
        assert record["setting"] in printed
        assert record["speedup"] > 0
    assert records[0]["psnr"] == float("inf")
