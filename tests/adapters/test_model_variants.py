"""What a class is beside its usual form: other versions, image to video, two texts."""

import diffusers
import models
import pytest
import torch
from model_case import find_class
from replay import replayed

import dbcache

FORCED = {
    "max_warmup_steps": 1,
    "residual_diff_threshold": 1.0,
    "enable_separate_cfg": False,
}
SETTINGS = {"F1B0": (1, 0), "F2B1": (2, 1)}


@pytest.fixture(params=models.VARIANTS)
def name(request):
    if find_class(request.param) is None:
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    yield request.param
    dbcache.disable(models.model(request.param))


def enable(name, fn, bn, **more):
    dbcache.enable(models.model(name), Fn_compute_blocks=fn, Bn_compute_blocks=bn, **FORCED | more)


def test_never_caching_is_bit_identical(name):
    plain = models.run(name, 3)
    enable(name, 1, 0, residual_diff_threshold=0.0)
    assert all(map(torch.equal, models.run(name, 3), plain))


@pytest.mark.parametrize("setting", SETTINGS)
def test_variants_give_the_outputs_of_a_replay_in_plain_torch(name, setting):
    fn, bn = SETTINGS[setting]
    expected = []
    with replayed(name, fn, bn) as replays:
        for step, seed in enumerate((7, 8, 7)):
            for replay in replays:
                replay.cached = step > 0
            expected += models.run(name, 1, seeds=[seed])
    enable(name, fn, bn)
    outputs = models.run(name, 3, seeds=[7, 8, 7])
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-5)
    for lane in dbcache.summary(models.model(name)).lanes:
        assert lane.cached_steps == [1, 2]
