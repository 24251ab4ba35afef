"""Guidance that comes and goes, leaves blocks out or adds calls, and ControlNets that end early.

Tiny real pipelines, forced to cache all steps but the first two: a full step after these is one
that the pipeline's own changes made necessary.
"""

import diffusers
import models
import pipelines
import pytest
import torch
from pipelines import RECIPES, decisions
from replay import replayed_calls

import dbcache

FORCED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")


def run(name, guided=True, pipe=None, **more):
    """Check that never caching is bit-identical; return the pipeline and what caching draws."""
    pipe = pipe or pipelines.build(name)
    plain = pipelines.draw(pipe, name, guided=guided, **more)
    dbcache.enable(pipe, Fn_compute_blocks=1, residual_diff_threshold=0.0)
    assert torch.equal(pipelines.draw(pipe, name, guided=guided, **more), plain)
    dbcache.enable(pipe, **FORCED)
    cached = pipelines.draw(pipe, name, guided=guided, **more)
    assert cached.isfinite().all()
    assert not torch.equal(cached, plain)
    return pipe, cached


def notes(pipe):
    return "\n".join(dbcache.summary(pipe).notes)


SKIPPING = {"skip_layer_guidance_stop": 0.9}
"""The call that leaves blocks out comes on steps 1 to 5 of 6."""


def test_skip_layer_guidance_has_a_lane_of_its_own():
    name, more = "Stable Diffusion 3", {"skip_guidance_layers": [3, 4], **SKIPPING}
    pipe, cached = run(name, **more)
    assert decisions(pipe) == [(None, "FFcccc"), ("skip_layers", "FFccc")]
    assert notes(pipe) == ""
    dbcache.disable(pipe)
    plan = [("all", False)]
    for step in range(1, 6):
        plan += [("all", step > 1), ("some", step > 2)]
    with replayed_calls(RECIPES[name].transformer, 1, 0, pipe.transformer, plan):
        expected = pipelines.draw(pipe, name, guided=True, **more)
    torch.testing.assert_close(cached, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 9], ids=["first", "first middle", "last middle"])
def test_skip_layer_guidance_without_a_block_that_the_cache_needs_runs_in_full(layer):
    pipe, _ = run("Stable Diffusion 3", skip_guidance_layers=[layer], **SKIPPING)
    assert decisions(pipe) == [(None, "FFcccc")]
    assert "5 calls left blocks out" in notes(pipe)
    dbcache.disable(pipe)


@pytest.mark.parametrize(
    ("layer", "lanes"),
    [(3, [None, "skip_layers"]), (1, [None]), (9, [None])],
    ids=["some", "the first that may be left out", "the last"],
)
def test_skip_layer_guidance_under_pruning(layer, lanes):
    name, more = "Stable Diffusion 3", {"skip_guidance_layers": [layer], **SKIPPING}
    pipe = pipelines.build(name)
    plain = pipelines.draw(pipe, name, guided=True, **more)
    config = {"Fn_compute_blocks": 1, "max_warmup_steps": 2}
    dbcache.enable(pipe, dbcache.DBPruneConfig(**config, residual_diff_threshold=0.0))
    assert torch.equal(pipelines.draw(pipe, name, guided=True, **more), plain)
    dbcache.enable(pipe, dbcache.DBPruneConfig(**config, residual_diff_threshold=0.3))
    assert pipelines.draw(pipe, name, guided=True, **more).isfinite().all()
    assert [lane.branch for lane in dbcache.summary(pipe).lanes] == lanes
    assert all(lane.cached_steps for lane in dbcache.summary(pipe).lanes)
    dbcache.disable(pipe)


def test_guidance_that_ends_leaves_each_call_in_its_lane():
    pipe, _ = run("Lumina 2", cfg_trunc_ratio=0.5)
    assert decisions(pipe) == [("cond", "FFcccc"), ("uncond", "FFc")]
    assert notes(pipe) == ""
    dbcache.disable(pipe)


def test_a_batch_that_shrinks_when_guidance_ends_starts_the_lane_anew():
    pipe, _ = run("Z-Image", cfg_truncation=0.5)
    ((branch, steps),) = decisions(pipe)
    assert branch is None
    assert steps.count("F") == 3
    assert dbcache.summary(pipe).lanes[0].counts["shape changed"] == 1
    dbcache.disable(pipe)


def test_a_callback_that_switches_guidance_off_starts_the_lane_anew():
    def switch_off(pipe, step, _, tensors):
        if step != 2:
            return {}
        pipe._guidance_scale = 0.0
        return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    more = {"callback_on_step_end": switch_off, "callback_on_step_end_tensor_inputs": names}
    pipe, _ = run("Stable Diffusion 3", **more)
    assert decisions(pipe) == [(None, "FFcFcc")]
    dbcache.disable(pipe)


@pytest.mark.parametrize(
    "name", ["FLUX.1 ControlNet", "Stable Diffusion 3 ControlNet", "Qwen-Image ControlNet"]
)
def test_the_step_on_which_a_controlnet_ends_is_full(name):
    pipe, _ = run(name, control_guidance_end=0.5)
    branches = RECIPES[name].branches
    assert decisions(pipe) == [(branch, "FFcFcc") for branch in branches]
    assert f"{len(branches)} steps were full since the scale of the ControlNet" in notes(pipe)
    dbcache.disable(pipe)


@pytest.mark.parametrize(
    "config",
    [
        dbcache.DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1.0),
        dbcache.DBCacheConfig(**FORCED, decision_scope="model"),
        dbcache.DBCacheConfig(
            Fn_compute_blocks=1,
            steps_computation_mask=[1, 1, 0, 0, 0, 0],
            steps_computation_policy="static",
        ),
    ],
    ids=["pruning", "one decision", "static mask"],
)
def test_the_step_on_which_a_controlnet_ends_is_full_whatever_decides(config):
    name = "FLUX.1 ControlNet"
    pipe = dbcache.enable(pipelines.build(name), config)
    pipelines.draw(pipe, name, guided=True, control_guidance_end=0.5)
    assert decisions(pipe) == [("cond", "FFcFcc"), ("uncond", "FFcFcc")]
    dbcache.disable(pipe)


def test_the_step_on_which_the_scale_of_lora_changes_is_full():
    def change(pipe, step, *_):
        pipe._joint_attention_kwargs = {"scale": 1.0 if step < 3 else 0.5}
        return {}

    more = {"callback_on_step_end": change, "joint_attention_kwargs": {"scale": 1.0}}
    pipe, _ = run("FLUX.1", **more)
    assert decisions(pipe) == [("cond", "FFccFc"), ("uncond", "FFccFc")]
    assert "inputs came, went or changed (the scale of an adapter)" in notes(pipe)
    dbcache.disable(pipe)


def skip_layer_guidance():
    """Return a guider that calls a third time on steps 2, 3 and 4 of 6."""
    return diffusers.SkipLayerGuidance(
        guidance_scale=2.5,
        skip_layer_config=diffusers.LayerSkipConfig(
            indices=[3], fqn="transformer_blocks", skip_attention=False
        ),
        skip_layer_guidance_start=0.3,
        skip_layer_guidance_stop=0.9,
    )


def test_a_guider_with_a_third_call_has_three_lanes():
    pipe = pipelines.build("HunyuanVideo 1.5")
    pipe.guider = skip_layer_guidance()
    run("HunyuanVideo 1.5", pipe=pipe)
    assert decisions(pipe) == [
        ("pred_cond", "FFcccc"),
        ("pred_uncond", "FFcccc"),
        ("pred_cond_skip", "FFc"),
    ]
    dbcache.disable(pipe)


def modular_pipeline(guider):
    """Return Stable Diffusion 3 as a modular pipeline, whose guider does not name its calls."""
    module = "diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3"
    blocks = pytest.importorskip(module).StableDiffusion3AutoBlocks()
    for name in ("text_encoder", "vae_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=models.model("SD3Transformer2DModel"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        guider=guider,
    )
    return pipe


@torch.no_grad()
def draw_modular(pipe):
    text = pipelines.arguments(pipe, "Stable Diffusion 3", guided=True, accepts_all=True)
    generator = torch.Generator().manual_seed(5)
    return pipe(**text, num_inference_steps=6, generator=generator, output="latents")


@pytest.mark.parametrize(
    ("make_guider", "wanted"),
    [
        (lambda: diffusers.ClassifierFreeGuidance(2.5), {"cond": "FFcccc", "uncond": "FFcccc"}),
        (lambda: diffusers.ClassifierFreeGuidance(1.0), {None: "FFcccc"}),
        (
            lambda: diffusers.ClassifierFreeGuidance(2.5, start=0.4),
            {"cond": "FFcccc", "uncond": "FFcc"},
        ),
        (
            lambda: diffusers.ClassifierFreeGuidance(2.5, stop=0.5),
            {"cond": "FFcccc", "uncond": "FFc"},
        ),
        (skip_layer_guidance, {"cond": "FFcccc", "uncond": "FFcccc", "branch 3": "FFc"}),
    ],
    ids=["on", "off", "late", "early", "skip-layer"],
)
def test_modular_pipelines_with_guiders_that_name_no_calls(make_guider, wanted):
    pipe = modular_pipeline(make_guider())
    plain = draw_modular(pipe)
    dbcache.enable(pipe, Fn_compute_blocks=1, residual_diff_threshold=0.0)
    assert torch.equal(draw_modular(pipe), plain)
    dbcache.enable(pipe, **FORCED)
    cached = draw_modular(pipe)
    assert dict(decisions(pipe)) == wanted
    assert notes(pipe) == ""
    assert not torch.equal(cached, plain)
    dbcache.disable(pipe)
    assert torch.equal(draw_modular(pipe), plain)


def test_videos_that_are_made_in_pieces_start_each_anew():
    name = "SkyReels-V2 diffusion forcing"
    pipe, _ = run(name, num_frames=13, base_num_frames=9, overlap_history=5)
    assert decisions(pipe) == [("cond", "FFcccc"), ("uncond", "FFcccc")]
    assert "denoised 2 times, the last time is shown" in notes(pipe)
    dbcache.disable(pipe)
