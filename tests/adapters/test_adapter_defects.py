"""What cache-dit 1.5.3 was seen to do wrong around adapters and pipelines, done right.

Each test is a case in which it gives a wrong output, fails, or ignores what it was told.
"""

import models
import pytest
import tiny
import torch
from diffusers import Flux2Transformer2DModel
from model_case import find_class

import dbcache
from dbcache import (
    BlockAdapter,
    DBCacheConfig,
    ForwardPattern,
    ParamsModifier,
)

FLUX, WAN = tiny.FAMILIES["flux"], tiny.FAMILIES["wan"]
FORCED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}


def trace(target, lane=0):
    """Return a letter per step, F or c."""
    summary = dbcache.summary(target).lanes[lane]
    return "".join("c" if step in summary.cached_steps else "F" for step in range(summary.steps))


def flux2(double):
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=double,
        num_single_layers=9,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=tiny.TEXT_DIM,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return tiny.fill(model, 3)


@pytest.mark.parametrize("scope", ["stack", "model"])
def test_a_list_shorter_than_the_default_probe_runs(scope):
    """There the default of 8 fails on FLUX.2's short list at the first forward."""
    model = flux2(double=3)
    with pytest.warns(UserWarning, match="transformer_blocks: .*Fn.*8"):
        dbcache.enable(model, max_warmup_steps=1, residual_diff_threshold=1, decision_scope=scope)
    tokens = torch.cartesian_prod(*[torch.arange(n) for n in (1, 4, 4, 1)])
    given = {
        "hidden_states": tiny.noise(1, 16, 16, seed=1),
        "encoder_hidden_states": tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=2),
        "timestep": torch.tensor([0.5]),
        "img_ids": tokens,
        "txt_ids": torch.zeros(tiny.TEXT_TOKENS, 4),
        "return_dict": False,
    }
    with torch.no_grad():
        full, cached = model(**given)[0], model(**given)[0]
    torch.testing.assert_close(cached, full, rtol=1e-4, atol=1e-5)
    assert trace(model, -1) == "Fc"


# blocks with long skips


@pytest.mark.skipif(find_class("HunyuanDiT2DModel") is None, reason="absent in this diffusers")
@pytest.mark.parametrize(("fn", "bn"), [(2, 2), (3, 1), (2, 1)])
def test_long_skips_reach_the_right_tail_blocks(fn, bn):
    """There tail blocks pop the skips of others: up to 40 % off, or an IndexError."""
    name = "HunyuanDiT2DModel"
    (plain,) = models.run(name, 1, seeds=[7])
    settings = {**FORCED, "Fn_compute_blocks": fn, "Bn_compute_blocks": bn, "max_warmup_steps": 1}
    dbcache.enable(models.model(name), **settings, enable_separate_cfg=False)
    full, cached = models.run(name, 2, seeds=[7, 7])
    dbcache.disable(models.model(name))
    assert torch.equal(full, plain)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)


# several models of one class


def twins(name="qwen"):
    """Return two pipelines of one class."""
    first, second = tiny.pipeline(name), tiny.pipeline(name)
    second.__class__ = type(first)
    return first, second


def test_disabling_one_pipeline_leaves_the_other_of_its_class_running():
    """There the other one then fails with an AttributeError."""
    first, second = twins()
    plain_call = type(first).__call__
    plain = tiny.generate(second, 4, guided=False)
    for pipe in (first, second):
        dbcache.enable(pipe, **FORCED)
    assert type(first).__base__.__call__ is plain_call
    dbcache.disable(first)
    outputs = tiny.generate(second, 4, guided=False)
    assert trace(second) == "FFcc"
    assert all(map(torch.equal, tiny.generate(first, 4, guided=False), plain))
    dbcache.disable(second)
    assert not all(map(torch.equal, outputs, plain))
    assert all(map(torch.equal, tiny.generate(second, 4, guided=False), plain))


def test_calling_one_pipeline_does_not_reset_the_other_of_its_class():
    """There each call resets the contexts of all pipelines of the class."""
    first, second = twins()
    dbcache.enable(first, **FORCED)
    dbcache.enable(second, **{**FORCED, "max_warmup_steps": 3})
    tiny.generate(first, 6, guided=False)
    tiny.generate(second, 5, guided=False)
    assert (trace(first), trace(second)) == ("FFcccc", "FFFcc")


def test_several_transformers_of_one_class_and_enabling_again_after_disabling():
    """There the second transformer, and the first once more, die with an AssertionError."""
    pair = [FLUX.build(), FLUX.build()]
    for model in (*pair, pair[0]):
        dbcache.disable(model)
        dbcache.enable(model, **FORCED)
        tiny.denoise(model, FLUX, 4)
        assert trace(model) == "FFcc"
    dbcache.disable(pair[0])
    dbcache.refresh_context(pair[1])
    tiny.denoise(pair[1], FLUX, 5)
    assert trace(pair[1]) == "FFccc"


# settings that are not ignored


@pytest.mark.parametrize(
    "wrong", [{"enable_sperate_cfg": True}, {"max_warm_steps": 4}, {"Fn": 1}, {"taylorseer": True}]
)
def test_misspelt_options_are_errors_everywhere(wrong):
    """There they are dropped, in `enable_cache`, in configs and in files alike."""
    model, (name,) = FLUX.build(), wrong
    for use in (
        lambda: dbcache.enable(model, **wrong),
        lambda: DBCacheConfig(**wrong),
        lambda: DBCacheConfig().update(**wrong),
        lambda: DBCacheConfig().reset(**wrong),
        lambda: dbcache.load_configs({"cache_config": wrong}),
        lambda: dbcache.load_configs(wrong),
    ):
        with pytest.raises(TypeError, match=f"unknown option '{name}'"):
            use()
    assert "_dbcache" not in model.__dict__


def test_more_modifiers_than_lists_are_an_error():
    """There extra ones are ignored, and stacks without one keep the base."""
    for count in (3, 4):
        with pytest.raises(ValueError, match="one entry per block stack"):
            dbcache.enable(FLUX.build(), params_modifiers=[ParamsModifier()] * count)


def test_the_automatic_adapter_keeps_what_else_it_was_given():
    """There guidance, modifiers and the functor are dropped."""
    model, patched = WAN.build(), []
    adapter = BlockAdapter(
        transformer=model,
        auto=True,
        has_separate_cfg=True,
        params_modifiers=ParamsModifier(cache_config=DBCacheConfig(max_warmup_steps=3)),
        patch_functor=patched.append,
    )
    dbcache.enable(adapter, **FORCED)
    tiny.denoise(model, WAN, 5, branches=tiny.BRANCHES)
    assert [lane.branch for lane in dbcache.summary(model).lanes] == ["cond", "uncond"]
    assert (trace(model), patched) == ("FFFcc", [model])


# which pipelines and transformers are found


class Pipe:
    """A pipeline of any kind: it has parts and can be called."""

    def __init__(self, **parts):
        self.__dict__.update(parts)

    def __call__(self, name, steps):
        return models.run(name, steps, seeds=list(range(steps)))


def test_a_transformer_by_another_name_is_cached_summed_up_and_given_back():
    """There `disable_cache` and `summary` do not find ShapE's, which is called prior."""
    name = "PriorTransformer"
    model = models.model(name)
    pipe = Pipe(prior=model)
    plain = pipe(name, 4)
    dbcache.enable(pipe, **FORCED)
    for _ in range(2):
        pipe(name, 4)
        assert trace(pipe) == "FFcc"
    dbcache.disable(pipe)
    assert type(pipe) is Pipe
    assert "_dbcache" not in model.__dict__
    assert all(map(torch.equal, pipe(name, 4), plain))


def test_a_class_that_only_begins_like_a_supported_one_is_refused():
    """There 50 of 182 pipelines whose names begin alike are accepted and fail later."""

    class FluxPriorPipeline(Pipe):
        pass

    class FluxTransformerHead(torch.nn.Module):
        pass

    for target in (
        FluxPriorPipeline(image_encoder=torch.nn.Linear(2, 2)),
        FluxPriorPipeline(transformer=FluxTransformerHead()),
        FluxTransformerHead(),
    ):
        with pytest.raises(ValueError, match="must be a supported one, got Flux"):
            dbcache.enable(target)
        assert type(target).__name__.startswith("Flux")
        assert "_dbcache" not in target.__dict__


def test_the_summary_is_in_the_order_in_which_the_stacks_run():
    """There it is alphabetical: single blocks before double ones, the last one's twice."""
    model = FLUX.build()
    adapter = BlockAdapter(
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=ForwardPattern.Pattern_1,
    )
    dbcache.enable(adapter, **FORCED)
    tiny.denoise(model, FLUX, 4)
    lanes = dbcache.summary(model).lanes
    assert [lane.stack for lane in lanes] == ["transformer_blocks", "single_transformer_blocks"]
    assert all(sum(lane.counts.values()) == lane.steps == 4 for lane in lanes)
