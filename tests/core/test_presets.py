"""Published settings: every row runs, families are found, few steps get rows of their own."""

from __future__ import annotations

import pytest
import tiny
import torch

import dbcache
from dbcache.config.presets import ALIASES, FAMILIES, LEVELS, find_preset
from dbcache.demo import digits

CLASSES = {"flux": "flux", "qwen": "qwen-image", "wan": "wan"}


@pytest.mark.filterwarnings("ignore:.*leaves none of the 10 blocks")
def test_every_row_names_its_source_and_can_be_enabled():
    pipe = tiny.pipeline("flux")
    for row in dbcache.presets():
        assert row.source
        assert row.published
        assert row.family in FAMILIES
        assert row.level in LEVELS
        options = row.arguments()
        modifiers = options.pop("params_modifiers", [None])
        for modifier in modifiers:
            dbcache.enable(pipe, **options, params_modifiers=modifier)
            dbcache.disable(pipe)
    for name in (*FAMILIES, *ALIASES):
        for level in LEVELS:
            for steps in (None, 1, 4, 5, 6, 8, 9, 12, 13, 50):
                assert dbcache.preset(name, level, num_inference_steps=steps)["cache_config"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_pipeline_and_its_transformer_tell_the_family(name):
    pipe = tiny.pipeline(name)
    for target in (pipe, pipe.transformer, CLASSES[name]):
        assert find_preset(target, "fast") == find_preset(CLASSES[name], "fast")


def test_two_transformers_of_wan_are_its_second_version():
    pipe = tiny.pipeline("wan")
    pipe.transformer_2 = tiny.wan(seed=4)
    row = find_preset(pipe, "balanced")
    assert row.family == "wan2.2"
    dbcache.enable(pipe, **row.arguments())
    dbcache.disable(pipe)


def test_unknown_video_and_image_models_take_the_engines_defaults():
    video = type("SomeTransformer3DModel", (torch.nn.Module,), {})()
    image = type("SomeTransformer2DModel", (torch.nn.Module,), {})()
    assert (find_preset(video).family, find_preset(image).family) == ("video", "image")


@pytest.mark.parametrize("steps", [4, 8, 9])
@pytest.mark.filterwarnings("ignore:.*leaves none of the 16 blocks")
def test_few_steps_cache_more_from_level_to_level_and_what_is_promised(steps):
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    cached = []
    for level in LEVELS:
        dbcache.enable(pipe, **dbcache.preset(pipe, level, num_inference_steps=steps))
        generator = torch.Generator().manual_seed(0)
        pipe(**digits.prompt([3]), num_inference_steps=steps, generator=generator)
        lanes = dbcache.summary(pipe, logging=False).lanes
        cached.append(len(lanes[0].cached_steps) if lanes else 0)
    dbcache.disable(pipe)
    assert cached == sorted(cached)
    assert 0 < cached[-1] <= steps // 2
    assert steps / (steps - cached[1]) <= 1.34


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("fluxx",), ValueError, "family must be one of flux, qwen-image"),
        (("flux", "ultra"), ValueError, "level must be one of"),
        ((object(),), TypeError, "a name, a pipeline or a transformer"),
        ((None, "fast"), TypeError, "a name, a pipeline or a transformer"),
    ],
)
def test_what_is_not_known_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        dbcache.preset(*arguments)
    with pytest.raises(ValueError, match="num_inference_steps"):
        dbcache.preset("flux", num_inference_steps=0)
