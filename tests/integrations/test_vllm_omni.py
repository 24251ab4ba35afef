"""The backend under vLLM-Omni's own selector, config, base class, guidance mixin and refresh."""

import gc
import importlib
import logging
import sys
import types
from collections import Counter
from pathlib import Path

import omni_like
import pytest
import tiny
import tomllib
import torch
from omni_like import OWN, SCALE, pipeline

import dbcache
from dbcache.adapters.requests.cached_transformer import HANDLE

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")


@pytest.fixture(scope="module")
def omni():
    with omni_like.engine() as engine:
        yield engine


def declaration(omni, family, separate_cfg=False):
    """Return what a model of the engine declares, for FLUX as the engine's own model does."""
    pattern = omni.cachedit.config.ForwardPattern.Pattern_1
    lists = tiny.FAMILIES[family].lists
    return omni.cachedit.CacheDiTAdapterConfig(
        block_forward_patterns=dict.fromkeys(lists, pattern), has_separate_cfg=separate_cfg
    )


@torch.no_grad()
def alone(pipe, steps, guides):
    """Return the image and the decisions of `dbcache.enable` alone: own loop, own names."""
    modules = [m for m in (pipe.transformer, pipe.transformer_2) if m is not None]
    for module in modules:
        target = module
        declared = getattr(module, "_cache_dit_adapter_config", None)
        if declared is not None:
            target = dbcache.BlockAdapter(
                transformer=module,
                blocks=[getattr(module, name) for name in declared.block_forward_patterns],
                forward_pattern=dbcache.ForwardPattern.Pattern_1,
            )
        dbcache.enable(target, **OWN)
    handles = [dbcache.start_request(module) for module in modules]
    family = next(
        f for f in tiny.FAMILIES.values() if isinstance(pipe.transformer, f.build().__class__)
    )
    x = tiny.noise(*family.latent_shape, seed=5)
    for i in range(steps):
        t, values = 1 - i / steps, {}
        for branch in tiny.BRANCHES[: 1 + guides]:
            model = pipe.model_at(t)
            with handles[modules.index(model)].branch(branch, step_index=i):
                values[branch] = model(**family.arguments(x, t, branch))[0]
        v = values["cond"]
        if guides:
            v = values["uncond"] + SCALE * (v - values["uncond"])
        x = x - v / steps
    found = [lane.reasons for handle in handles for lane in handle.summary()]
    for module, handle in zip(modules, handles, strict=True):
        handle.close()
        dbcache.disable(module)
    return x, found


def decisions(pipe):
    modules = [m for m in (pipe.transformer, pipe.transformer_2) if m is not None]
    return [lane.reasons for m in modules for lane in dbcache.summary(m, logging=False)]


@pytest.mark.parametrize("name", ["flux", "qwen", "wan"])
def test_outputs_and_decisions_are_those_of_enable_alone(omni, name):
    declared = declaration(omni, name) if name == "flux" else None
    pipe = pipeline(omni, name, declared=declared)
    plain = {key: pipe(*key) for key in ((12, True), (8, False))}
    expected = {key: alone(pipe, *key) for key in plain}
    own, attributes = dict(pipe.__dict__), dict(pipe.transformer.__dict__)
    backend = omni.selector.get_cache_backend("dbcache", dict(OWN))
    assert isinstance(backend, omni.base)
    assert not backend.is_enabled()
    backend.enable(pipe)
    assert backend.is_enabled()
    # the engine does not call `refresh` where it does not know the steps
    for steps, guides, is_told in ((12, True, False), (8, False, True), (12, True, True)):
        omni.refresh(backend, pipe, steps if is_told else None)
        image, reasons = expected[steps, guides]
        assert torch.equal(pipe(steps, guides), image)
        assert decisions(pipe) == reasons
        assert not torch.equal(image, plain[steps, guides])
    backend.disable(pipe)
    assert not backend.is_enabled()
    assert all(torch.equal(pipe(*key), image) for key, image in plain.items())
    assert pipe.__dict__ == own
    assert pipe.transformer.__dict__.keys() == attributes.keys()
    assert HANDLE not in pipe.transformer.__dict__


@pytest.mark.parametrize("declares", [False, True])
@pytest.mark.parametrize("has_forward", [False, True])
def test_full_calls_do_not_depend_on_what_a_model_declares_of_guidance(omni, declares, has_forward):
    pipe = pipeline(omni, "flux", declared=declaration(omni, "flux", separate_cfg=declares))
    calls = Counter()
    pipe.transformer.single_transformer_blocks[-1].register_forward_hook(
        lambda *_: calls.update(full=1)
    )
    target = pipe if has_forward else types.SimpleNamespace(transformer=pipe.transformer)
    backend = omni.selector.get_cache_backend("dbcache", dict(OWN))
    backend.enable(target)
    for guides, full in ((False, 8), (True, 16), (False, 8)):
        calls.clear()
        backend.refresh(target, 20, verbose=False)
        if has_forward:
            pipe(20, guides)
        else:  # only the transformer is called, without a name
            tiny.denoise(
                pipe.transformer, tiny.FAMILIES["flux"], 20, branches=tiny.BRANCHES[: 1 + guides]
            )
        assert calls["full"] == full
    backend.disable(target)


def test_options_are_the_engines_and_those_of_enable(omni):
    make = omni.selector.get_cache_backend
    pipe = pipeline(omni, "qwen")

    def settings(config):
        backend = make("dbcache", config)
        backend.enable(pipe)
        backend.refresh(pipe, 28)
        setup = pipe.transformer.__dict__[HANDLE].setup
        backend.disable(pipe)
        return setup

    for nothing in (None, {}):
        setup = settings(nothing)
        assert setup.config.strify() == "DBCache_F1B0_W4I1M0MC3_R0.24_N28"
        assert setup.base.predictor.strify() == dbcache.CalibratorConfig().strify()
    taylor = settings({"enable_taylorseer": True, "taylorseer_order": 2}).base.predictor
    assert (taylor.taylorseer_order, taylor.enable_encoder_calibrator) == (2, True)
    foca = settings({"enable_foca": True, "policy": "seacache", "max_cached_steps": 5})
    assert (foca.config.policy, foca.config.max_cached_steps) == ("seacache", 5)
    assert isinstance(foca.base.predictor, dbcache.FoCaCalibratorConfig)
    masked = settings({"scm_steps_mask_policy": "fast", "scm_steps_policy": "static"}).config
    assert (masked.steps_computation_mask, masked.steps_computation_policy) == ("fast", "static")
    for wrong, error in (
        ({"residual_diff_treshold": 0.1}, "did you mean 'residual_diff_threshold'"),
        ({"rel_l1_thresh": 0.2}, "rel_l1_thresh is an option of another cache backend"),
        ([1], "must be a dictionary"),
    ):
        with pytest.raises(TypeError, match=error):
            make("dbcache", wrong)
    with pytest.raises(ValueError, match="a policy's name must be one of"):
        make("dbcache", {"scm_steps_mask_policy": "quick"})
    with pytest.raises(ValueError, match="'step_cache', 'dbcache'"):
        make("dbcash", None)


def test_a_named_mask_counts_once_the_engine_tells_the_steps(omni):
    pipe = pipeline(omni, "qwen")
    config = OWN | {"scm_steps_mask_policy": "ultra", "residual_diff_threshold": 1.0}
    backend = omni.selector.get_cache_backend("dbcache", config)
    backend.enable(pipe)
    mask = dbcache.steps_mask(mask_policy="ultra", total_steps=10)
    pipe(10)
    assert Counter(decisions(pipe)[0])["mask"] == 0
    for _ in range(2):
        omni.refresh(backend, pipe, 10)
        pipe(10)
        (reasons,) = decisions(pipe)
        full = [reason in ("mask", "warm-up") for reason in reasons]
        assert [int(f) for f in full] == [
            m or r == "consecutive limit" for m, r in zip(mask, reasons, strict=True)
        ]
    backend.disable(pipe)


def test_the_engine_finds_the_plugin(omni):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    from vllm_omni.plugins import OMNI_DEFAULT_PLUGINS_GROUP

    entry = project["entry-points"][OMNI_DEFAULT_PLUGINS_GROUP]
    assert entry == {"dbcache": f"{omni.ours.__name__}:{omni.ours.register.__name__}"}


def test_nothing_is_left_of_the_name_and_of_an_enable_that_fails(omni):
    replaced = omni.selector.get_cache_backend
    omni.ours.unregister()
    assert omni.selector.get_cache_backend is replaced.without_dbcache
    with pytest.raises(ValueError, match="Unsupported cache backend: dbcache"):
        omni.selector.get_cache_backend("dbcache", None)
    # a process that has not imported the engine's function yet
    del sys.modules[omni.selector.__name__]
    finders = list(sys.meta_path)
    for _ in range(2):
        omni.ours.register()
    assert omni.selector.__name__ not in sys.modules
    assert len(sys.meta_path) == len(finders) + 1
    later = importlib.import_module(omni.selector.__name__)
    assert sys.meta_path == finders
    assert later.get_cache_backend("dbcache", None).is_enabled() is False
    omni.ours.unregister()
    with pytest.raises(ValueError, match="Unsupported cache backend: dbcache"):
        later.get_cache_backend("dbcache", None)
    del sys.modules[omni.selector.__name__]
    omni.ours.register()
    omni.ours.unregister()
    assert sys.meta_path == finders
    sys.modules[omni.selector.__name__] = omni.selector

    omni.ours.register()
    again = omni.selector.get_cache_backend
    omni.ours.register()
    assert omni.selector.get_cache_backend is again

    pipe = pipeline(omni, "wan")
    cached = omni.cachedit.CacheDiTAdapterConfig({}, cached_adapter_cls=type("OwnAdapter", (), {}))
    pipe.transformer_2._cache_dit_adapter_config = cached
    own, attributes = dict(pipe.__dict__), dict(pipe.transformer.__dict__)
    backend = omni.selector.get_cache_backend("dbcache", None)
    with pytest.raises(ValueError, match=r"OwnAdapter.*--cache-backend cache_dit"):
        backend.enable(pipe)
    assert (pipe.__dict__, pipe.transformer.__dict__) == (own, attributes)
    assert not backend.is_enabled()
    with pytest.raises(ValueError, match="must have a denoising module"):
        backend.enable(types.SimpleNamespace(unet=torch.nn.Linear(1, 1)))


def test_pipeline_parallelism_is_refused(omni, monkeypatch):
    from vllm_omni.diffusion.distributed import parallel_state

    pipe = pipeline(omni, "qwen")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "_PP", types.SimpleNamespace(world_size=2))
    with pytest.raises(RuntimeError, match="without pipeline parallelism"):
        omni.selector.get_cache_backend("dbcache", dict(OWN)).enable(pipe)
    assert HANDLE not in pipe.transformer.__dict__


class Stranger(torch.nn.Module):
    """A model that no table knows and that declares nothing; its blocks have other names."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x, temb):
            x = x + 0.1 * torch.tanh(self.linear(x + temb))
            return x

    def __init__(self):
        super().__init__()
        self.stack = torch.nn.ModuleList(self.Block() for _ in range(4))

    def forward(self, hidden_states, timestep):
        for block in self.stack:
            hidden_states = block(hidden_states, timestep[:, None, None])
        return (hidden_states,)


def test_a_model_that_declares_nothing_is_read(omni):
    torch.manual_seed(0)
    pipe = types.SimpleNamespace(model=Stranger(), _dit_modules=["gone", "model"])
    backend = omni.selector.get_cache_backend("dbcache", OWN | {"residual_diff_threshold": 1.0})
    backend.enable(pipe)
    with torch.no_grad():
        for step in range(9):
            pipe.model(tiny.noise(1, 3, 8, seed=step), torch.tensor([1 - step / 9]))
    (lane,) = dbcache.summary(pipe.model, logging=False)
    assert lane.cached_steps == [4, 5, 6, 8]
    backend.disable(pipe)


def test_requests_that_cache_nothing_are_said_once_in_the_engines_log(omni, caplog):
    pipe = pipeline(omni, "qwen")
    backend = omni.selector.get_cache_backend("dbcache", OWN | {"residual_diff_threshold": 1e-6})
    backend.enable(pipe)

    def said():
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="vllm_omni"):
            omni.refresh(backend, pipe, 3)
            pipe(3)
            for _ in range(2):
                omni.refresh(backend, pipe, 6)
                pipe(6)
        return [r.getMessage() for r in caplog.records if r.name.startswith("vllm_omni")]

    first, second = said()
    assert "nothing was cached in 3 steps: all of them were fixed as full by warm-up" in first
    assert "in 6 steps: the cache never hit, the smallest change was" in second
    assert said() == []
    backend.disable(pipe)


def test_step_wise_requests_are_requests_of_their_own(omni, caplog):
    pipe = pipeline(omni, "qwen")
    backend = omni.selector.get_cache_backend("dbcache", dict(OWN))
    backend.enable(pipe)

    def begin(seed, steps):
        x = tiny.noise(*tiny.FAMILIES["qwen"].latent_shape, seed=seed)
        return omni.state(str(seed), None, latents=x, timesteps=torch.arange(steps))

    @torch.no_grad()
    def advance(state):
        pipe.step_scheduler(state, pipe.denoise_step(None, states=[state]))
        return state.denoise_completed

    expected = {
        (seed, steps): pipe(steps, True, seed) for seed, steps in ((5, 12), (6, 9), (7, 10))
    }
    before = dbcache.summary(pipe.transformer, logging=False).totals
    states = {key: begin(*key) for key in expected}
    waiting, active = list(states), [next(iter(states))]
    for turn in range(40):  # requests join and leave
        active += waiting[1 + turn : 2 + turn]
        for key in list(active):
            if advance(states[key]):
                assert torch.equal(pipe.post_decode(states[key]), expected[key])
                active.remove(key)
    given_up = begin(8, 9)
    advance(given_up)
    handle = pipe.transformer.__dict__[HANDLE]
    assert len(handle.under_way()) == 1
    del given_up
    gc.collect()
    last = begin(9, 9)
    advance(last)
    assert len(handle.under_way()) == 1  # that of `last`
    after = dbcache.summary(pipe.transformer, logging=False).totals
    assert after["requests"] - before["requests"] == 4
    assert after["cached_steps"] - before["cached_steps"] == before["cached_steps"]

    backend.disable(pipe)
    assert HANDLE not in pipe.transformer.__dict__


@torch.no_grad()
@pytest.mark.parametrize("each", [True, False])
def test_steps_of_several_requests_in_one_batch(omni, each, caplog):
    pipe = pipeline(omni, "qwen")
    config = OWN | ({"batch_reduce": "each"} if each else {})
    backend = omni.selector.get_cache_backend("dbcache", config)
    backend.enable(pipe)
    plans = ((5, 12), (6, 9), (7, 10))
    expected = {(seed, steps): pipe(steps, True, seed) for seed, steps in plans}
    before = dbcache.summary(pipe.transformer, logging=False).totals
    waiting = [(k, omni.state(str(k), None, timesteps=torch.arange(k[1]))) for k in expected]
    for key, state in waiting:
        state.latents = tiny.noise(*tiny.FAMILIES["qwen"].latent_shape, seed=key[0])
    active, caplog.handler.level = [], logging.WARNING
    images = {}
    for turn in range(40):
        if turn % 2 == 0 and waiting:  # requests join, and leave
            active.append(waiting.pop(0))
        if not active:
            break
        noise = pipe.denoise_step(None, states=[state for _, state in active])
        for (key, state), v in list(zip(active, noise.split(1), strict=True)):
            pipe.step_scheduler(state, v)
            if state.denoise_completed:
                images[key] = pipe.post_decode(state)
                active.remove((key, state))
    after = dbcache.summary(pipe.transformer, logging=False).totals
    backend.disable(pipe)
    assert images.keys() == expected.keys()
    if each:
        assert all(torch.allclose(images[key], expected[key], atol=1e-5) for key in images)
        for name in ("requests", "steps", "cached_steps"):
            assert after[name] == 2 * before[name]
    else:
        assert "steps of several requests in one batch run without the cache" in caplog.text
