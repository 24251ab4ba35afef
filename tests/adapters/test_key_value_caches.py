"""Models that keep keys and values of reference images over the steps, with the cache on."""

import sys

import diffusers
import models
import pytest
import tiny
import torch
from model_case import TEXT, find_class

import dbcache

STEPS = 6


def beside(model, name):
    """Return a class from the module of the model's own class."""
    return getattr(sys.modules[type(model).__module__], name)


def text(seed=11):
    return tiny.noise(*TEXT, seed=seed)


def flux2(model, latents, times):
    """The first step holds 4 tokens of a reference image too and extracts their keys and values."""
    kv_cache, reference = None, tiny.noise(1, 4, 16, seed=3)
    arguments = dict(models.CASES["Flux2Transformer2DModel"].inputs)
    for step, (x, time) in enumerate(zip(latents, times, strict=True)):
        more = {"kv_cache": kv_cache, "kv_cache_mode": "cached"}
        if step == 0:
            x = torch.cat([reference, x], 1)
            more = {"kv_cache_mode": "extract", "num_ref_tokens": 4}
        ids = arguments["img_ids"]
        output = model(
            hidden_states=x,
            encoder_hidden_states=text(),
            timestep=torch.tensor([time]),
            img_ids=torch.cat([ids[:4], ids]) if step == 0 else ids,
            txt_ids=arguments["txt_ids"],
            **more,
        )
        if step == 0:
            kv_cache = output.kv_cache
            assert isinstance(kv_cache, beside(model, "Flux2KVCache"))
        yield output.sample


def qwen21(model, latents, times):
    """The first step runs text and image; later ones the image alone."""
    kv_cache = beside(model, "QwenImage21KVCache")(len(model.transformer_blocks))
    for step, (x, time) in enumerate(zip(latents, times, strict=True)):
        output = model(
            hidden_states=x,
            encoder_hidden_states=text(),
            timestep=torch.tensor([time]),
            kv_cache=kv_cache,
            kv_cache_mode="cached" if step else "extract",
            **models.CASES["QwenImage21Transformer2DModel"].inputs,
        )
        yield output.sample[:, -16:]


def glm(model, latents, times):
    """Two calls before the loop fill in the keys and values of two images."""
    kv_caches = beside(model, "GlmImageKVCache")(len(model.transformer_blocks))
    arguments = models.CASES["GlmImageTransformer2DModel"].inputs | {"kv_caches": kv_caches}
    kv_caches.set_mode("write")
    for seed in (21, 22):
        model(
            hidden_states=tiny.noise(1, 4, 8, 8, seed=seed),
            encoder_hidden_states=text()[:, :0],
            timestep=torch.zeros(1),
            **arguments,
        )
    for x, time in zip(latents, times, strict=True):
        for mode, seed in (("read", 11), ("skip", 12)):
            kv_caches.set_mode(mode)
            arguments |= {
                "encoder_hidden_states": text(seed),
                "timestep": torch.tensor([1000 * time]),
            }
            yield model(hidden_states=x, **arguments).sample


LOOPS = {
    "Flux2Transformer2DModel": (flux2, (1, 16, 16), [0, 1]),
    "QwenImage21Transformer2DModel": (qwen21, (1, 16, 8), [0, 1]),
    "GlmImageTransformer2DModel": (glm, (1, 4, 8, 8), [0]),
}
"""The loop, the shape of a latent, and the steps that are full for the lack of a reference."""


@pytest.fixture(params=LOOPS)
def name(request):
    if find_class(request.param) is None:
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    yield request.param
    dbcache.disable(models.model(request.param))


def enable(name, threshold=1.0):
    """Cache all steps from the second on; only GLM-Image's loop has two guidance branches."""
    dbcache.enable(
        models.model(name),
        Fn_compute_blocks=1,
        max_warmup_steps=1,
        residual_diff_threshold=threshold,
        enable_separate_cfg=name.startswith("Glm"),
    )


@torch.no_grad()
def outputs(name, *, same=False):
    """Return the outputs of a loop whose inputs change with the steps, or are the `same`."""
    loop, shape, _ = LOOPS[name]
    latents = [tiny.noise(*shape, seed=1 if same else step) for step in range(STEPS)]
    times = [1.0 if same else 1 - step / STEPS for step in range(STEPS)]
    return list(loop(models.model(name), latents, times))


def test_never_caching_is_bit_identical(name):
    plain = outputs(name)
    enable(name, threshold=0.0)
    assert all(map(torch.equal, outputs(name), plain))


def test_calls_that_fill_run_all_blocks_and_are_no_cached_steps(name):
    enable(name)
    full = LOOPS[name][2]
    for _ in range(2):  # the second request finds the lanes of the first
        dbcache.refresh_context(models.model(name))
        outputs(name)
        for lane in dbcache.summary(models.model(name)).lanes:
            assert lane.steps == STEPS
            assert lane.cached_steps == [step for step in range(STEPS) if step not in full]


def test_the_same_input_gives_the_same_output_full_and_cached(name):
    plain = outputs(name, same=True)
    enable(name)
    for output, expected in zip(outputs(name, same=True), plain, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
