"""The hooks under SGLang's own plugin registry, denoising stage and cache-dit integration."""

import importlib.metadata
import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import sglang_stub
import tiny
import tomllib
import torch

import dbcache
from dbcache.integrations.sglang.settings import CHOSEN, OPTIONS

GROUP = "sglang.multimodal_gen.plugins"
ROOT = Path(__file__).resolve().parents[2]
FAST = {
    "SGLANG_CACHE_DIT_ENABLED": "true",
    "SGLANG_CACHE_DIT_WARMUP": "2",
    "SGLANG_CACHE_DIT_RDT": "0.5",
    "SGLANG_CACHE_DIT_MC": "2",
}

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels", "chosen")


@pytest.fixture(scope="module")
def engine():
    """The engine's modules, in which its own registry has found the entry point."""
    text = (ROOT / "pyproject.toml").read_text()
    value = tomllib.loads(text)["project"]["entry-points"][GROUP]["dbcache"]
    points = [importlib.metadata.EntryPoint("dbcache", value, GROUP)]
    with pytest.MonkeyPatch.context() as patch, sglang_stub.engine() as modules:
        patch.setenv(CHOSEN, "1")
        patch.setattr(
            modules.plugins, "entry_points", lambda group: points if group == GROUP else []
        )
        modules.untouched = dict(vars(modules.cache_dit_integration))
        modules.plugins.apply_plugin_hooks()
        yield modules


@pytest.fixture
def chosen(monkeypatch):
    """An environment in which caching is on, by dbcache."""
    for name, value in {CHOSEN: "1", **FAST}.items():
        monkeypatch.setenv(name, value)


def request(stage, steps, family="flux", branches=("cond",), **sampling):
    """Run one request as the engine does; return all outputs of the model."""
    batch = sglang_stub.batch(steps, **sampling)
    batch.do_classifier_free_guidance = len(branches) > 1
    with torch.inference_mode():  # as the engine's executors do
        stage._maybe_enable_cache_dit(steps, batch)
        return tiny.denoise(stage.transformer, tiny.FAMILIES[family], steps, branches=branches)


def cached_steps(module):
    """Return how many steps each lane cached."""
    return [len(lane.cached_steps) for lane in dbcache.summary(module, logging=False).lanes]


def both_ways(monkeypatch, run):
    """Return what `run` gives under cache-dit and under dbcache."""
    found = []
    for value in ("0", "1"):
        monkeypatch.setenv(CHOSEN, value)
        found.append(run())
    return found


def test_all_hooks_are_applied_also_where_functions_were_imported_by_name(engine):
    from dbcache.integrations.sglang.hooks import HOOKS, INTEGRATION

    registry = engine.plugins.HookRegistry
    assert set(HOOKS) == set(registry._hooks) == registry._patched
    assert {s.plugin_name for hooks in registry._hooks.values() for _, _, s in hooks} == {"dbcache"}
    for name in (target.rpartition(".")[2] for target in HOOKS if target.startswith(INTEGRATION)):
        now = getattr(engine.cache_dit_integration, name)
        assert now.__wrapped__ is engine.untouched[name]
        assert getattr(engine.denoising, name) is now


@pytest.mark.parametrize(
    ("family", "branches", "more"),
    [
        ("flux", ("cond",), {}),
        (
            "flux",
            ("cond",),
            {"cache_dit_params": {"Bn_compute_blocks": 1, "enable_taylorseer": True}},
        ),
        ("flux", ("cond",), {"cache_dit_params": {"scm_preset": "fast", "scm_policy": "static"}}),
        ("qwen", ("cond", "uncond"), {"cache_dit_params": {"max_continuous_cached_steps": 1}}),
    ],
)
def test_requests_are_those_of_its_cache_dit_path(engine, monkeypatch, family, branches, more):
    def run():
        stage = sglang_stub.stage(engine.denoising, tiny.FAMILIES[family].build())
        before = set(vars(stage.transformer))
        outputs = []
        for steps in (10, 10, 8):  # mounted, refreshed, refreshed with other steps
            outputs += request(stage, steps, family, branches, **more)
        is_ours = dbcache.is_enabled(stage.transformer)
        counts = cached_steps(stage.transformer) if is_ours else []
        outputs += request(stage, 4, family, branches, enable_cache_dit=False)
        return outputs, is_ours, counts, set(vars(stage.transformer)) - before

    (theirs, is_on, *_), (ours, is_ours, counts, left) = both_ways(monkeypatch, run)
    assert (is_on, is_ours, left) == (False, True, set())
    assert len(counts) == len(branches)
    assert all(counts), "nothing was cached"
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-6)
    plain = tiny.denoise(tiny.FAMILIES[family].build(), tiny.FAMILIES[family], 4, branches=branches)
    for a, b in zip(plain, ours[-4 * len(branches) :], strict=True):
        assert torch.equal(a, b), "not restored"


def test_two_experts_are_those_of_its_cache_dit_path(engine, monkeypatch):
    monkeypatch.setenv("SGLANG_CACHE_DIT_SECONDARY_WARMUP", "3")
    monkeypatch.setenv("SGLANG_CACHE_DIT_SECONDARY_RDT", "0.3")
    family, params = tiny.FAMILIES["wan"], {"secondary": {"max_continuous_cached_steps": 1}}

    def run():
        pair = tiny.wan(), tiny.wan(seed=9)
        stage = sglang_stub.stage(engine.denoising, *pair)
        outputs = []
        for steps in ((6, 8), (8, 7)):
            batch = sglang_stub.batch(None, cache_dit_params=params)
            batch.do_classifier_free_guidance = True
            stage._maybe_enable_cache_dit(steps, batch)
            for module, count in zip(pair, steps, strict=True):
                outputs += tiny.denoise(module, family, count, branches=tiny.BRANCHES)
        is_ours = [dbcache.is_enabled(module) for module in pair]
        counts = [cached_steps(module) for module in pair] if all(is_ours) else []
        stage._unmount_cache_dit()
        assert not any(dbcache.is_enabled(module) for module in pair)
        return outputs, is_ours, counts

    (theirs, is_on, _), (ours, is_ours, counts) = both_ways(monkeypatch, run)
    assert (is_on, is_ours) == ([False, False], [True, True])
    assert all(map(all, counts)), "nothing was cached"
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-6)


def test_a_failed_mount_of_the_second_expert_leaves_nothing(engine):
    pair = tiny.wan(), tiny.wan(seed=9)
    stage = sglang_stub.stage(engine.denoising, *pair)
    wrong = sglang_stub.batch(None, cache_dit_params={"secondary": {"taylorseer_order": 0.5}})
    wrong.sampling_params.cache_dit_params["secondary"]["enable_taylorseer"] = True
    with pytest.raises(TypeError, match="taylorseer_order must be an integer"):
        stage._maybe_enable_cache_dit((6, 6), wrong)
    assert not any("_dbcache" in vars(m) or "forward" in vars(m) for m in pair)
    assert not stage._cache_dit_enabled


def test_guidance_is_told_per_request(engine, monkeypatch):
    """cache-dit goes by a flag of the class, which is wrong for half of the requests."""

    def run():
        stage = sglang_stub.stage(engine.denoising, tiny.flux())
        calls = []
        stage.transformer.transformer_blocks[2].register_forward_pre_hook(
            lambda *_: calls.append(None)
        )
        request(stage, 12, branches=("cond", "uncond"))
        return len(calls)

    theirs, ours = both_ways(monkeypatch, run)
    assert (theirs, ours) == (24, 10)


def test_models_that_only_the_engine_describes_are_cached(engine):
    name = "Krea2Transformer2DModel"
    assert name in engine.cache_dit_integration._CUSTOM_BLOCK_ADAPTER_SPECS
    engine.cache_dit_integration._CUSTOM_BLOCK_ADAPTER_SPECS["Renamed"] = (
        engine.cache_dit_integration._CUSTOM_BLOCK_ADAPTER_SPECS[name]
    )
    case, transformer = models.ALL[name], models.model(name)
    transformer.__class__ = type("Renamed", (type(transformer),), {})
    dit = sglang_stub.stage(engine.denoising, transformer)
    params = {"residual_diff_threshold": 1.0}
    dit._maybe_enable_cache_dit(10, sglang_stub.batch(10, cache_dit_params=params))
    x = tiny.noise(*case.latent, seed=5)
    for step in range(10):
        time = torch.full((1,), case.start * (1 - step / 10))
        with torch.no_grad():
            x = x - transformer(**case.call_arguments(x, time))[0].reshape(x.shape) / 10
    assert hasattr(transformer, "_sglang_cache_dit_adapter")
    assert sum(cached_steps(transformer))
    dit._unmount_cache_dit()
    assert not hasattr(transformer, "_sglang_cache_dit_adapter")


def test_failed_requests_and_other_sizes_leave_nothing_to_the_next_one(engine, monkeypatch):
    stage, real, calls = sglang_stub.stage(engine.denoising, tiny.flux()), tiny.noise, []
    expected = request(stage, 10)

    def fail(*_):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt

    hook = stage.transformer.transformer_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        request(stage, 10)
    hook.remove()
    assert all(map(torch.equal, request(stage, 10), expected))
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "noise", lambda n, *size, seed=0: real(n + 1, *size, seed=seed))
        assert len(request(stage, 8)[0]) == 2
    assert all(map(torch.equal, request(stage, 10), expected))
    monkeypatch.delenv(CHOSEN)  # what is mounted serves on, and is taken off by what mounted it
    assert all(map(torch.equal, request(stage, 10), expected))
    stage._unmount_cache_dit()
    assert "_dbcache" not in vars(stage.transformer)


def settings(stage):
    return dbcache.strify(stage.transformer).rpartition("_S")[0]


def test_options_of_dbcache_per_request_and_of_the_server(engine, monkeypatch, tmp_path):
    stage = sglang_stub.stage(engine.denoising, tiny.flux())
    request(stage, 6)
    plain = settings(stage)
    assert plain.startswith("DBCache_F1B0_W2I1M0MC2_R0.5_")
    with warnings.catch_warnings(record=True) as said:
        request(stage, 6, cache_dit_params={"policy": "easycache", "max_warmup_steps": 3})
    assert not [str(w.message) for w in said if "no effect" in str(w.message)]
    assert settings(stage).startswith("EasyCache_F0B0_W3I1M0MC2")
    request(stage, 6, cache_dit_params={"enable_foca": True})
    foca = settings(stage)
    assert foca != plain
    monkeypatch.setenv("SGLANG_CACHE_DIT_TAYLORSEER", "true")
    request(stage, 6, cache_dit_params={"enable_foca": True, "decision_scope": "model"})
    assert settings(stage).replace("DSmodel_", "") == foca, (
        "the predictor of the request is in place of the engine's"
    )
    request(stage, 6)
    assert settings(stage) not in (plain, foca)
    (tmp_path / "own.yaml").write_text("enable_foca: true\nmax_cached_steps: 1\n")
    flat = '{"enable_foca": true, "max_cached_steps": 1, "num_inference_steps": 3}'  # it runs 6
    for text in (flat, str(tmp_path / "own.yaml")):
        monkeypatch.setenv(OPTIONS, text)
        stage._unmount_cache_dit()
        request(stage, 6)
        assert cached_steps(stage.transformer) == [1]
        assert settings(stage) == foca.replace("M0", "M1")
    stage._unmount_cache_dit()


@pytest.mark.parametrize(
    ("params", "environment", "text"),
    [
        (
            {"enable_focca": True},
            "",
            "cache_dit_params: unknown option 'enable_focca'; did you mean",
        ),
        ({"policy": "lazy"}, "", "policy must be one of"),
        (
            {"secondary": {"scm_preset": "fast"}},
            "",
            r"\['secondary'\]: unknown option 'scm_preset'",
        ),
        ({"secondary": 3}, "", "must be a dict"),
        (None, "{", "SGLANG_DBCACHE_OPTIONS"),
        (None, "[1]", "SGLANG_DBCACHE_OPTIONS"),
        (None, '{"polcy": 1}', "SGLANG_DBCACHE_OPTIONS: unknown option 'polcy'"),
        (None, "nowhere.json", "SGLANG_DBCACHE_OPTIONS"),
    ],
)
def test_what_is_wrong_fails_the_request(engine, monkeypatch, params, environment, text):
    monkeypatch.setenv(OPTIONS, environment)
    stage = sglang_stub.stage(engine.denoising, tiny.flux())
    with pytest.raises((TypeError, ValueError, OSError), match=text):
        request(stage, 6, cache_dit_params=params)
    assert "_dbcache" not in vars(stage.transformer)
    assert not stage._cache_dit_enabled


def test_without_the_choice_all_falls_through(engine, monkeypatch):
    monkeypatch.delenv(CHOSEN)
    stage = sglang_stub.stage(engine.denoising, tiny.flux())
    with pytest.raises(ValueError, match="Unknown cache_dit_params keys: \\['policy'\\]"):
        request(stage, 6, cache_dit_params={"policy": "easycache"})
    request(stage, 6)
    assert hasattr(stage.transformer, "_context_manager"), "cache-dit's"
    assert not dbcache.is_enabled(stage.transformer)
    from dbcache.integrations.sglang import register

    registry = engine.plugins.HookRegistry
    before = {target: list(hooks) for target, hooks in registry._hooks.items()}
    register()
    assert registry._hooks == before
    monkeypatch.setenv(CHOSEN, "1")
    stage._unmount_cache_dit()  # what cache-dit mounted it takes off
    assert not hasattr(stage.transformer, "_context_manager")


def test_the_groups_of_the_engine_decide_together(engine, monkeypatch):
    seen = []
    group = SimpleNamespace(world_size=2, device_group="sp")
    alone = SimpleNamespace(world_size=1, device_group="tp")
    for name, value in {"get_world_size": 2, "get_sp_group": group, "get_tp_group": alone}.items():
        monkeypatch.setattr(engine.denoising, name, lambda value=value: value)
    monkeypatch.setattr(engine.cache_dit_integration, "get_dit_group", lambda: "dit")
    monkeypatch.setattr(
        engine.cache_dit_integration, "get_classifier_free_guidance_world_size", lambda: 2
    )
    enable = dbcache.enable

    def note(target, *, decide_together, **options):
        seen.append(decide_together)
        return enable(target, **options)

    monkeypatch.setattr(dbcache, "enable", note)
    stage = sglang_stub.stage(engine.denoising, tiny.flux())
    request(stage, 4)
    stage._unmount_cache_dit()
    stage._cache_dit_joint_cfg_decision = lambda: True
    request(stage, 4)
    stage._unmount_cache_dit()
    pair = sglang_stub.stage(engine.denoising, tiny.wan(), tiny.wan())
    pair._maybe_enable_cache_dit((4, 4), sglang_stub.batch(None))
    pair._unmount_cache_dit()
    assert seen == [["sp"], ["sp", "dit"], ["sp"], ["sp"]]


@pytest.mark.filterwarnings("ignore:.*nothing was cached")
def test_requests_that_cached_nothing_are_said_in_the_log(engine, caplog):
    stage = sglang_stub.stage(engine.denoising, tiny.flux())
    with caplog.at_level(logging.DEBUG, logger="dbcache"):
        for steps in (7, 7, 6):
            request(stage, steps, cache_dit_params={"residual_diff_threshold": 1e-4})
        stage._unmount_cache_dit()
    texts = [record.getMessage() for record in caplog.records]
    assert sum("nothing was cached in 7 steps" in text for text in texts) >= 2
    assert any("nothing was cached in 6 steps: the cache never hit" in text for text in texts)
    assert len([text for text in texts if text.startswith("stack ")]) == 3, "a summary each"


def test_the_diffusers_backend_takes_the_same_file(engine, monkeypatch, tmp_path):
    path = tmp_path / "cache.yaml"
    path.write_text(
        "cache_config:\n  Fn_compute_blocks: 1\n  max_warmup_steps: 2\n"
        "  residual_diff_threshold: 0.5\n  max_continuous_cached_steps: 2\n"
    )

    def run():
        backend = engine.diffusers_pipeline.DiffusersPipeline.__new__(
            engine.diffusers_pipeline.DiffusersPipeline
        )
        pipe = tiny.pipeline("flux")
        pipe = backend._apply_cache_dit(pipe, SimpleNamespace(cache_dit_config=str(path)))
        latents = tiny.generate(pipe, 10, guided=False)
        return latents, dbcache.is_enabled(pipe)

    (theirs, is_on), (ours, is_ours) = both_ways(monkeypatch, run)
    assert (is_on, is_ours) == (False, True)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-6)
    pipe = tiny.pipeline("flux")
    engine.diffusers_pipeline.DiffusersPipeline._apply_cache_dit(
        None, pipe, SimpleNamespace(cache_dit_config=None)
    )
    assert not dbcache.is_enabled(pipe)
    assert "torchvision" not in sys.modules
