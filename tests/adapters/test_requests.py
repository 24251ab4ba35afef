"""Requests and guidance branches: where one image ends and the next begins."""

import copy
import pickle

import inside
import models
import pytest
import tiny
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline

import dbcache
from dbcache import DBCacheConfig

FLUX = tiny.FAMILIES["flux"]


def options(**changes):
    defaults = {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 2,
        "residual_diff_threshold": 1.0,
        "max_continuous_cached_steps": 2,
    }
    return DBCacheConfig(**{**defaults, **changes})


def decisions(target):
    """Return F for full and c for cached, per lane."""
    return {
        lane.branch: "".join("c" if s in lane.cached_steps else "F" for s in range(lane.steps))
        for lane in dbcache.summary(target).lanes
    }


def call(model, count, branches=("cond",), named=False, first=0):
    x = tiny.noise(*FLUX.latent_shape, seed=5)
    with torch.no_grad():
        for step in range(first, first + count):
            for branch in branches:
                arguments = FLUX.arguments(x, 1 - step / 50, branch)
                if named:
                    with model.cache_context(branch):
                        model(**arguments)
                else:
                    model(**arguments)


def test_every_pipeline_call_is_a_request_of_its_own():
    pipe = dbcache.enable(tiny.pipeline("flux"), options())
    first = tiny.generate(pipe, 8, guided=False)
    again = tiny.generate(pipe, 8, guided=False)
    assert decisions(pipe) == {"cond": "FFccFccF"}
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    tiny.generate(pipe, 5, guided=False)
    assert decisions(pipe) == {"cond": "FFccF"}


def test_guidance_switched_on_and_off_between_calls():
    pipe = dbcache.enable(tiny.pipeline("qwen"), options())
    tiny.generate(pipe, 6, guided=True)
    assert decisions(pipe) == {"cond": "FFccFc", "uncond": "FFccFc"}
    tiny.generate(pipe, 6, guided=False)
    assert decisions(pipe) == {"cond": "FFccFc"}


def test_transformer_starts_anew_after_its_steps_not_one_call_later():
    model = dbcache.enable(tiny.flux(), options(num_inference_steps=6))
    call(model, 6)
    assert decisions(model) == {None: "FFccFc"}
    call(model, 3)
    assert decisions(model) == {None: "FFc"}
    call(model, 4)
    assert decisions(model) == {None: "F"}


@torch.no_grad()
def test_a_last_call_that_leaves_blocks_out_belongs_to_the_last_step():
    name = "SD3Transformer2DModel"
    model, case = models.model(name), models.CASES[name]
    dbcache.enable(model, options(num_inference_steps=3, enable_separate_cfg=False))
    arguments = case.call_arguments(tiny.noise(*case.latent, seed=5), torch.tensor([500.0]))
    for steps in (3, 2):
        for _ in range(steps):
            model(**arguments)
            model(**arguments, skip_layers=[4])
        assert decisions(model) == dict.fromkeys([None, "skip_layers"], "FFc"[:steps])
    dbcache.disable(model)


@pytest.mark.parametrize("named", [True, False], ids=["named", "by parity"])
def test_branches_keep_their_roles_over_requests(named):
    config = options(num_inference_steps=4, enable_separate_cfg=True)
    model = dbcache.enable(tiny.flux(), config)
    for _ in range(3):
        call(model, 4, tiny.BRANCHES, named)
        assert decisions(model) == {"cond": "FFcc", "uncond": "FFcc"}
    call(model, 1, tiny.BRANCHES, named)
    assert decisions(model) == {"cond": "F", "uncond": "F"}


def test_uncond_may_come_first():
    model = dbcache.enable(tiny.flux(), options(enable_separate_cfg=True, cfg_compute_first=True))
    call(model, 1, ("uncond",))
    assert decisions(model) == {"uncond": "F"}


def test_second_branch_can_take_the_diff_of_the_first():
    shared = options(
        enable_separate_cfg=True, cfg_diff_compute_separate=False, residual_diff_threshold=0.3
    )
    model = dbcache.enable(tiny.flux(), shared)
    call(model, 8, tiny.BRANCHES)
    cond, uncond = dbcache.summary(model).lanes
    assert cond.diffs
    assert cond.diffs == uncond.diffs
    dbcache.enable(model, shared, cfg_diff_compute_separate=True)
    call(model, 8, tiny.BRANCHES)
    cond, uncond = dbcache.summary(model).lanes
    assert cond.diffs != uncond.diffs


def test_refresh_context_starts_a_request_and_changes_only_what_is_given():
    model = dbcache.enable(tiny.flux(), options())
    call(model, 5)
    dbcache.refresh_context(model, num_inference_steps=3, verbose=True)
    call(model, 4)
    assert decisions(model) == {None: "F"}
    dbcache.refresh_context(model, cache_config=DBCacheConfig(max_continuous_cached_steps=1))
    call(model, 3)
    assert decisions(model) == {None: "FFc"}
    dbcache.refresh_context(model, num_inference_steps=9)
    call(model, 7)
    assert decisions(model) == {None: "FFcFcFc"}
    with pytest.raises(ValueError, match="warmup_interval"):
        dbcache.refresh_context(model, warmup_interval=0)
    assert decisions(model) == {None: "FFcFcFc"}


@pytest.mark.parametrize(("policy", "last"), [("once", "FFcc"), ("repeat", "FF")])
def test_forced_refresh_counts_calls(policy, last):
    config = options(force_refresh_step_hint=3, force_refresh_step_policy=policy)
    model = dbcache.enable(tiny.flux(), config)
    call(model, 5)
    assert decisions(model) == {None: "FF"}
    call(model, 2 if policy == "once" else 3, first=5)
    assert decisions(model) == {None: last}


def test_two_transformers_count_their_own_steps():
    pipe = dbcache.enable(tiny.pipeline("wan2.2"), options())
    tiny.generate(pipe, 10)
    summary = dbcache.summary(pipe)
    assert len(summary.lanes) == 4
    assert sum(lane.steps for lane in summary.lanes) == 20
    assert all(lane.reasons[:2] == ["warm-up"] * 2 for lane in summary.lanes)


def test_two_pipelines_of_one_class_do_not_touch_each_other():
    one, two = tiny.pipeline("flux"), tiny.pipeline("flux")
    two.__class__ = type(one)
    plain = tiny.generate(two, 6, guided=False)
    dbcache.enable(one, options())
    assert all(map(torch.equal, tiny.generate(two, 6, guided=False), plain))
    dbcache.enable(two, options(max_continuous_cached_steps=1))
    tiny.generate(one, 6, guided=False)
    tiny.generate(two, 6, guided=False)
    assert decisions(one) == {"cond": "FFccFc"}
    assert decisions(two) == {"cond": "FFcFcF"}
    dbcache.disable(one)
    tiny.generate(two, 6, guided=False)
    assert decisions(two) == {"cond": "FFcFcF"}


def test_pipelines_that_share_a_transformer_each_start_requests():
    one = tiny.pipeline("flux")
    two = FluxPipeline(**one.components)
    two.set_progress_bar_config(disable=True)
    dbcache.enable(one, options())
    dbcache.enable(two, options(max_continuous_cached_steps=1))
    for pipe, expected in ((one, "FFccF"), (two, "FFcFc"), (one, "FFccF")):
        tiny.generate(pipe, 5, guided=False)
        assert decisions(pipe) == {"cond": expected}
    dbcache.disable(two)
    tiny.generate(one, 5, guided=False)
    assert decisions(one) == {"cond": "FFccF"}
    dbcache.disable(one)
    assert "_dbcache" not in one.transformer.__dict__
    assert type(two) is FluxPipeline


def test_call_from_another_pipeline_runs_without_the_cache_and_says_so():
    one = tiny.pipeline("flux")
    two = FluxImg2ImgPipeline(**{**one.components, "vae": None})
    assert two.transformer is one.transformer
    model = one.transformer
    plain = tiny.denoise(model, FLUX, 4)
    dbcache.enable(one, options())
    with pytest.warns(UserWarning, match="outside of a call of the pipeline"):
        assert all(map(torch.equal, tiny.denoise(model, FLUX, 4), plain))
    assert "4 calls came from outside" in str(dbcache.summary(one))
    dbcache.refresh_context(model)
    tiny.denoise(model, FLUX, 4)
    assert decisions(one) == {None: "FFcc"}


def test_mask_of_another_length_than_the_steps_is_refused_at_the_first_step():
    pipe = dbcache.enable(tiny.pipeline("flux"), options(steps_computation_mask=[1, 1, 0, 1]))
    tiny.generate(pipe, 4, guided=False)
    with pytest.raises(ValueError, match="got 4 for 6 steps"):
        tiny.generate(pipe, 6, guided=False)


def test_enabling_twice_sets_anew_and_disabling_twice_is_fine():
    pipe = tiny.pipeline("flux")
    cls, attributes = type(pipe), dict(pipe.transformer.__dict__)
    plain = tiny.generate(pipe, 6, guided=False)
    dbcache.enable(pipe, options())
    dbcache.enable(pipe, options(residual_diff_threshold=0.0))
    assert all(map(torch.equal, tiny.generate(pipe, 6, guided=False), plain))
    assert dbcache.disable(dbcache.disable(pipe)) is pipe
    assert type(pipe) is cls
    assert "_dbcache" not in pipe.__dict__
    after = pipe.transformer.__dict__
    assert after.keys() - {"_diffusers_hook"} == attributes.keys() - {"_diffusers_hook"}
    with pytest.raises(RuntimeError, match="must be enabled"):
        dbcache.summary(pipe)


def test_failed_enable_leaves_the_old_settings_in_force():
    pipe = dbcache.enable(tiny.pipeline("flux"), options())
    with pytest.raises(TypeError, match="did you mean 'Fn_compute_blocks'"):
        dbcache.enable(pipe, Fn_compute_block=1)
    with pytest.raises(ValueError, match="params_modifiers"):
        dbcache.enable(pipe, params_modifiers=[dbcache.ParamsModifier()] * 3)
    tiny.generate(pipe, 6, guided=False)
    assert decisions(pipe) == {"cond": "FFccFc"}


def test_enable_does_not_change_the_config_object():
    config = options()
    before = config.as_dict()
    pipe = dbcache.enable(tiny.pipeline("wan"), config)
    config.update(Fn_compute_blocks=3)
    tiny.generate(pipe, 6)
    assert inside.stacks(pipe.transformer)[0].fn == 1
    config.update(Fn_compute_blocks=1)
    assert config.as_dict() == before


def pickled(pipe):
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_plain_and_share_nothing(copied):
    pipe = FluxPipeline(**tiny.pipeline("flux").components)
    pipe.set_progress_bar_config(disable=True)
    plain = tiny.generate(pipe, 6, guided=False)
    dbcache.enable(pipe, options())
    cached = tiny.generate(pipe, 6, guided=False)
    twin = copied(pipe)
    assert type(twin) is FluxPipeline
    assert all(map(torch.equal, tiny.generate(twin, 6, guided=False), plain))
    dbcache.enable(twin, options(max_continuous_cached_steps=1))
    tiny.generate(twin, 6, guided=False)
    assert all(map(torch.equal, tiny.generate(pipe, 6, guided=False), cached))
    dbcache.disable(twin)
    assert all(map(torch.equal, tiny.generate(twin, 6, guided=False), plain))


def test_enabled_pipeline_saves_like_a_plain_one(tmp_path):
    pipe = FluxPipeline(**tiny.pipeline("flux").components)
    dbcache.enable(pipe, options())
    pipe.save_pretrained(tmp_path)
    absent = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    loaded = FluxPipeline.from_pretrained(tmp_path, **dict.fromkeys(absent))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is FluxPipeline
    dbcache.disable(pipe)
    pipe.set_progress_bar_config(disable=True)
    want = tiny.generate(pipe, 4, guided=False)
    assert all(map(torch.equal, tiny.generate(loaded, 4, guided=False), want))


def test_hooks_that_were_added_later_survive_disable():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = tiny.flux()
    plain = tiny.denoise(model, FLUX, 5)
    dbcache.enable(model, options(num_inference_steps=5))
    add_hook_to_module(model, ModelHook())
    tiny.denoise(model, FLUX, 5)
    assert decisions(model) == {None: "FFccF"}
    dbcache.disable(model)
    assert all(map(torch.equal, tiny.denoise(model, FLUX, 5), plain))
    remove_hook_from_module(model)
    assert all(map(torch.equal, tiny.denoise(model, FLUX, 5), plain))
