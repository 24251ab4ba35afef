"""What is said beside errors: once per request, as a warning and in the log, and in the summary."""

import logging
import re
import threading
import warnings
from contextlib import contextmanager, suppress

import diffusers
import pytest
import tiny
import torch

import dbcache

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

FLUX = tiny.FAMILIES["flux"]
HITS = {"Fn_compute_blocks": 1, "residual_diff_threshold": 1.0}


@contextmanager
def heard(caplog):
    """Yield a list of what is said inside, as a warning of Python's and in the log alike."""
    said = []
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert said == [r.getMessage() for r in caplog.records if r.name == "dbcache"]
    assert all(w.filename.endswith(("tiny.py", "test_notices.py")) for w in caught)


NOTHING = {
    "warm-up": ({"max_warmup_steps": 8}, 4, r"in 4 steps: all .* warm-up; set max_warmup_steps"),
    "threshold": (
        {"residual_diff_threshold": 0.01},
        4,
        r"smallest change was 0\.\d+ and the threshold is 0\.01; raise residual_diff_threshold",
    ),
    "hidden states": (
        {"l1_hidden_states_diff_threshold": 1e-4},
        4,
        r"the threshold is 0\.0001; raise l1_hidden_states_diff_threshold",
    ),
    "policy": ({"policy": "easycache", "residual_diff_threshold": 1e-4}, 4, "smallest change"),
    "prune": ({"cache_type": "DBPrune", "residual_diff_threshold": 1e-4}, 4, "smallest change"),
    "mask": ({"steps_computation_mask": [1] * 4}, 4, "steps_computation_mask; give it a 0"),
    "limit": ({"max_cached_steps": 0, **HITS}, 4, "max_cached_steps or .* is 0; leave it out"),
    "one step": (HITS, 1, "in 1 step: one step has none before it"),
    "blocks": ({"Fn_compute_blocks": 10}, 4, "all 10 blocks run on every step.*; lower Fn_"),
}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.filterwarnings("ignore:.*leaves none of")
def test_a_request_that_cached_nothing_says_why_and_what_to_do(kind, guided, caplog):
    options, steps, text = NOTHING[kind]
    pipe = dbcache.enable(tiny.pipeline("flux"), **options)
    with heard(caplog) as said:
        tiny.generate(pipe, steps, guided=guided)
    assert len(said) == 1
    assert re.search(text, said[0])
    summary = dbcache.summary(pipe)
    assert said[0] in summary.warnings
    assert said[0] in str(summary)
    assert "no step was run" not in str(summary)


@pytest.mark.parametrize(
    "options",
    [HITS, {"residual_diff_threshold": 0.0}, {"cache_type": "DBPrune", **HITS}],
    ids=["it hit", "threshold 0", "it left blocks out"],
)
def test_nothing_is_said_where_there_is_nothing_to_say(options, caplog):
    with heard(caplog) as said:
        pipe = dbcache.enable(tiny.pipeline("flux"), **options)
        for _ in range(2):
            tiny.generate(pipe, 4)
        dbcache.summary(pipe)
        dbcache.disable(pipe)
    assert said == []


def test_each_request_says_it_once_and_many_do_not_fill_the_log(caplog):
    pipe = dbcache.enable(tiny.pipeline("flux"), max_warmup_steps=2)
    with heard(caplog) as said:
        for _ in range(12):
            tiny.generate(pipe, 2, guided=False)
    assert len(said) == 10
    assert "from now on only in summary" in said[-1]
    assert "warm-up" in str(dbcache.summary(pipe))


def test_requests_that_were_cut_short_are_not_judged(caplog):
    pipe = dbcache.enable(tiny.pipeline("flux"))
    model = pipe.transformer

    def fail(*_):
        if model.norm_out.calls == 1:
            raise InterruptedError
        model.norm_out.calls += 1

    model.norm_out.calls = 0
    handle = model.norm_out.register_forward_pre_hook(fail)
    with heard(caplog) as said:
        with pytest.raises(InterruptedError):
            tiny.generate(pipe, 4, guided=False)
        handle.remove()
        assert said == []
        tiny.generate(pipe, 4, guided=False)
    assert len(said) == 1
    request = dbcache.start_request(dbcache.enable(model), num_inference_steps=8)
    with heard(caplog) as said:
        with request:
            tiny.denoise(model, FLUX, 3)
        request.close()
    assert said == []


def test_a_transformer_alone_says_it_at_the_end_of_each_image(caplog):
    model = dbcache.enable(FLUX.build(), num_inference_steps=3, residual_diff_threshold=0.01)
    for _ in range(2):
        with heard(caplog) as said:
            tiny.denoise(model, FLUX, 3, branches=tiny.BRANCHES, named=True)
        assert len(said) == 1
        assert said[0] in str(dbcache.summary(model))
    with heard(caplog) as said:
        dbcache.disable(model)
    assert said == []
    dbcache.enable(model, residual_diff_threshold=0.01)
    with heard(caplog) as said:
        tiny.denoise(model, FLUX, 3)
        assert said == []
        dbcache.disable(model)  # nothing else tells that the image is over
    assert len(said) == 1


def test_calls_outside_of_a_request(caplog):
    pipe = dbcache.enable(tiny.pipeline("flux"))
    with heard(caplog) as said:
        tiny.denoise(pipe.transformer, FLUX, 3)
    assert len(said) == 1
    assert "outside of a call of the pipeline" in said[0]
    text = str(dbcache.summary(pipe))
    assert "3 calls came from outside" in text
    assert "no step was run" not in text


def test_requests_that_ended_unseen_are_counted():
    model = dbcache.enable(FLUX.build(), **HITS)
    assert str(dbcache.summary(model)) == "dbcache: no step was run yet"
    thread = threading.Thread(target=lambda: tiny.denoise(model, FLUX, 2))
    thread.start()
    thread.join()
    assert "1 requests ended unseen" in str(dbcache.summary(model))
    tiny.denoise(model, FLUX, 2)
    assert len(dbcache.summary(model).lanes) == 1


@pytest.mark.parametrize("by", ["parameters", "inputs"])
def test_gradients(by, caplog):
    model = FLUX.build().requires_grad_(by == "parameters")
    dbcache.enable(model, max_warmup_steps=1, **HITS)
    x = tiny.noise(1, 16, 16, seed=1).requires_grad_(by == "inputs")
    with heard(caplog) as said:
        for step in range(3):
            model(**FLUX.arguments(x, 1 - step / 3, "cond"))
        with torch.no_grad():
            dbcache.refresh_context(model)
            model(**FLUX.arguments(x, 1.0, "cond"))
    assert len(said) == 1
    assert "gradients are on" in said[0]
    assert "torch.no_grad()" in said[0]


@torch.no_grad()
def _call(model):
    with model.cache_context("cond"):
        model(**FLUX.arguments(tiny.noise(1, 16, 16, seed=1), 1.0, "cond"))


CACHES = {
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda: diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)),
    "TaylorSeerCache": lambda: diffusers.TaylorSeerCacheConfig(),
    "Pyramid Attention Broadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "FasterCache": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_another_cache_of_diffusers(name, caplog):
    model = FLUX.build()
    model.enable_cache(CACHES[name]())
    with pytest.raises(ValueError, match=rf"{name}.*remove it first: transformer.disable_cache"):
        dbcache.enable(model)
    assert not dbcache.is_enabled(model)
    model.disable_cache()
    dbcache.enable(model, **HITS)
    _call(model)
    model.enable_cache(CACHES[name]())
    dbcache.refresh_context(model)
    # FasterCache wants both branches in a batch
    with heard(caplog) as said, suppress(IndexError):
        for _ in range(2):
            _call(model)
    assert len(said) == 1
    assert f"{name} was enabled on the same model after dbcache" in said[0]
    if name != "FasterCache":
        assert said[0] in str(dbcache.summary(model))


def test_a_cache_applied_without_enable_cache_is_removed_by_its_hook():
    pipe = tiny.pipeline("flux")
    diffusers.hooks.apply_first_block_cache(pipe.transformer, CACHES["FirstBlockCache"]())
    with pytest.raises(ValueError, match=r"remove it first: diffusers\.hooks\.Hook") as found:
        dbcache.enable(pipe)
    name = re.search(r"remove_hook\('(\w+)'", str(found.value)).group(1)
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    for hook in (name, name.replace("leader_", "")):
        registry.remove_hook(hook, recurse=True)
    dbcache.enable(pipe)


def test_cache_dit_on_the_same_pipeline(caplog):
    cache_dit = pytest.importorskip("cache_dit")
    pipe = tiny.pipeline("flux")
    cache_dit.enable_cache(pipe)
    for target in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match=r"cache-dit.*cache_dit.disable_cache\(pipe\)"):
            dbcache.enable(target)
    cache_dit.disable_cache(pipe)
    dbcache.enable(pipe)
    cache_dit.enable_cache(pipe)
    with caplog.at_level(logging.WARNING), pytest.warns(UserWarning, match="cache-dit was"):
        tiny.generate(pipe, 2, guided=False)
    said = [r.getMessage() for r in caplog.records if r.name == "dbcache"]
    assert "cache-dit was enabled on the same model after dbcache" in said[0]
    assert said[0] in str(dbcache.summary(pipe))
    cache_dit.disable_cache(pipe)


WITHOUT_EFFECT = {
    "static without a mask": {"steps_computation_policy": "static"},
    "threshold with static": {
        "steps_computation_policy": "static",
        "steps_computation_mask": [1, 0, 1, 0],
        "residual_diff_threshold": 0.2,
    },
    "two thresholds": {"residual_diff_threshold": 0.2, "l1_hidden_states_diff_threshold": 0.1},
    "a probe that is none": {"policy": "easycache", "Fn_compute_blocks": 2},
    "interval of no warm-up": {"max_warmup_steps": 0, "warmup_interval": 2},
    "last blocks": {"non_compute_blocks_diff_threshold": 0.2},
    "refresh policy": {"force_refresh_step_policy": "repeat"},
    "one stack": {"decision_scope": "model", "Fn_compute_blocks": 1},
    "no predictor": {
        "calibrator_config": dbcache.TaylorSeerCalibratorConfig(
            taylorseer_order=2, enable_calibrator=False, enable_encoder_calibrator=False
        )
    },
}


@pytest.mark.parametrize("kind", WITHOUT_EFFECT)
def test_options_without_effect_are_said_when_they_are_given(kind, caplog):
    options = WITHOUT_EFFECT[kind]
    with heard(caplog) as said:
        model = dbcache.enable(FLUX.build(), **options)
        dbcache.refresh_context(model)
        dbcache.start_request(model, num_inference_steps=4).close()
    assert len(said) == 1
    name = next(iter(options)) if kind != "threshold with static" else "residual_diff_threshold"
    assert f"{'taylorseer_order' if kind == 'no predictor' else name}" in said[0]
    assert "has no effect" in said[0]
    assert said[0] in str(dbcache.summary(model))


def test_steps_that_are_not_those_of_the_pipeline(caplog):
    pipe = dbcache.enable(tiny.pipeline("flux"), num_inference_steps=28, **HITS)
    with heard(caplog) as said:
        tiny.generate(pipe, 4)
    assert len(said) == 1
    assert "num_inference_steps=28" in said[0]
    assert "4 steps" in said[0]
    model = dbcache.enable(FLUX.build(), steps_computation_mask=[1, 0, 0], **HITS)
    with heard(caplog) as said:
        tiny.denoise(model, FLUX, 5)
        dbcache.refresh_context(model)
    assert len(said) == 1
    assert "has 3 entries, and 5 steps were run" in said[0]


def test_pipelines_of_one_transformer_keep_their_settings_or_are_refused():
    first, second = tiny.pipeline("flux"), tiny.pipeline("flux")
    second.transformer = model = first.transformer
    dbcache.enable(first, max_warmup_steps=1, **HITS)
    dbcache.enable(second, Fn_compute_blocks=2, max_warmup_steps=3, residual_diff_threshold=1.0)
    for pipe, cached in ((first, 3), (second, 1), (first, 3)):
        tiny.generate(pipe, 4, guided=False)
        assert len(dbcache.summary(pipe)[0].cached_steps) == cached
    adapter = dbcache.BlockAdapter(
        pipe=second,
        transformer=model,
        blocks=model.transformer_blocks,
        forward_pattern=dbcache.ForwardPattern.Pattern_1,
        patch_functor=lambda transformer: None,
    )
    with pytest.raises(ValueError, match="must have the same patch_functor"):
        dbcache.enable(adapter, **HITS)
    tiny.generate(second, 4, guided=False)
    assert len(dbcache.summary(second)[0].cached_steps) == 1


def test_a_transformer_that_was_exchanged(caplog):
    pipe = dbcache.enable(tiny.pipeline("flux"), max_warmup_steps=1, **HITS)
    own = pipe.transformer
    pipe.transformer = torch.nn.Sequential(own)  # a wrapper, as torch.compile and PEFT make
    with heard(caplog) as said, suppress(AttributeError):
        tiny.generate(pipe, 2, guided=False)
    assert said == []
    pipe.transformer = tiny.flux()
    with heard(caplog) as said:
        tiny.generate(pipe, 3, guided=False)
    assert len(said) == 1
    assert "another one than dbcache was enabled on" in said[0]
    assert said[0] in str(dbcache.summary(pipe))
    dbcache.disable(pipe)
    dbcache.enable(pipe, max_warmup_steps=1, **HITS)
    with heard(caplog) as said:
        tiny.generate(pipe, 3, guided=False)
    assert said == []
    assert dbcache.summary(pipe)[0].cached_steps == [1, 2]


@pytest.mark.parametrize("options", [{}, {"num_inference_steps": 4}, {"enable_separate_cfg": True}])
def test_branches_that_nobody_names_and_that_share_a_lane(options, caplog):
    model = dbcache.enable(FLUX.build(), max_warmup_steps=1, **HITS, **options)
    texts = [FLUX.arguments(tiny.noise(1, 16, 16, seed=1), 1.0, name) for name in tiny.BRANCHES]
    with heard(caplog) as said, torch.no_grad():
        for step in range(4):
            for text in texts:
                model(**text | {"timestep": torch.tensor([1 - step / 4])})
        dbcache.refresh_context(model)
    if "enable_separate_cfg" in options:
        assert said == []
    else:
        assert "two conditionings took turns" in said[0]
        assert "cache_context('cond')" in said[0]
