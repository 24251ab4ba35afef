"""Hooks of accelerate and diffusers on a transformer: they come and go, and the cache stays."""

import functools
import random

import accelerate
import diffusers
import pytest
import tiny
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from together import decisions, same

import dbcache
from dbcache.adapters.patching.instance_method import InstanceMethod

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

FLUX = tiny.FAMILIES["flux"]
STEPS = 6
OPTIONS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 1.0,
    "max_continuous_cached_steps": 2,
}
KEPT = ("forward", "original_forward", "__wrapped__", "args", "_fn_refs")
CPU = torch.device("cpu")


def pipeline():
    """Return a FLUX pipeline of 2 + 4 blocks."""
    pipe = tiny.pipeline("flux")
    pipe.register_modules(transformer=tiny.flux(double=2, single=4))
    return pipe


def enable(pipe):
    dbcache.enable(pipe, **OPTIONS)


def counted(model):
    """Return a counter of the calls of all blocks."""
    calls = [0]

    def count(*_):
        calls[0] += 1

    for name in FLUX.lists:
        for block in getattr(model, name):
            block.register_forward_pre_hook(count)
    return calls


def model_offload(pipe):
    # the pipeline's own way to put the hooks back after each call asks for an accelerator
    pipe.enable_model_cpu_offload = functools.partial(
        type(pipe).enable_model_cpu_offload, pipe, device="cpu"
    )
    pipe.enable_model_cpu_offload()


def sequential_offload(pipe):
    pipe.remove_all_hooks()
    accelerate.cpu_offload(pipe.transformer, CPU, offload_buffers=False)


def group_offload(pipe, kind="block_level"):
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type=kind, num_blocks_per_group=2)


def layerwise(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float16, torch.float32)


WAYS = {
    "model": model_offload,
    "sequential": sequential_offload,
    "block": group_offload,
    "leaf": functools.partial(group_offload, kind="leaf_level"),
    "layerwise": layerwise,
}


def lora(model):
    """Return the weights of a LoRA on two layers."""
    weights = {}
    for name in ("transformer_blocks.1.attn.to_q", "single_transformer_blocks.2.attn.to_k"):
        layer = model.get_submodule(name)
        weights[f"transformer.{name}.lora_A.weight"] = tiny.noise(2, layer.in_features, seed=3)
        weights[f"transformer.{name}.lora_B.weight"] = tiny.noise(layer.out_features, 2, seed=4)
    return weights


@functools.cache
def cached_alone(*, casts):
    """Return what a pipeline with the cache gives, its decisions, and how many blocks ran."""
    pipe = pipeline()
    calls = counted(pipe.transformer)
    dbcache.enable(pipe, **OPTIONS)
    if casts:
        layerwise(pipe)
    return tiny.generate(pipe, STEPS, guided=False), decisions(pipe), calls[0]


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_every_request_is_cached_under_offloading(way, is_first):
    want, pattern, expected = cached_alone(casts=way == "layerwise")
    assert "c" in pattern[0]
    pipe = pipeline()
    calls = counted(pipe.transformer)
    for switch_on in (WAYS[way], enable) if is_first else (enable, WAYS[way]):
        switch_on(pipe)
    for _ in range(3):
        calls[0] = 0
        assert same(tiny.generate(pipe, STEPS, guided=False), want)
        assert (decisions(pipe), calls[0]) == (pattern, expected)
    if way == "model":
        calls[0] = 0
        pipe.enable_model_cpu_offload()  # once more
        assert same(tiny.generate(pipe, STEPS, guided=False), want)
        pipe.remove_all_hooks()
        assert same(tiny.generate(pipe, STEPS, guided=False), want)
        assert calls[0] == 2 * expected
    dbcache.disable(pipe)
    calls[0] = 0
    tiny.generate(pipe, STEPS, guided=False)
    assert calls[0] == STEPS * 6


@pytest.mark.parametrize("way", ["model", "sequential", "block", "leaf"])
def test_lora_that_is_loaded_under_offloading_leaves_the_cache_on(way):
    pytest.importorskip("peft")
    plain = pipeline()
    enable(plain)
    plain.load_lora_weights(lora(plain.transformer))
    want = tiny.generate(plain, STEPS, guided=False)
    pipe = pipeline()
    pipe.enable_sequential_cpu_offload = lambda **_: sequential_offload(pipe)
    WAYS[way](pipe)
    enable(pipe)
    assert not same(tiny.generate(pipe, STEPS, guided=False), want)
    pipe.load_lora_weights(lora(pipe.transformer))
    for _ in range(2):
        assert same(tiny.generate(pipe, STEPS, guided=False), want)
        assert decisions(pipe) == decisions(plain)


class Noting(accelerate.hooks.ModelHook):
    """A hook of accelerate that notes its calls."""

    def __init__(self, calls):
        self.calls = calls

    def pre_forward(self, module, *args, **kwargs):
        self.calls.add("accelerate")
        return args, kwargs


class Around(diffusers.hooks.ModelHook):
    """A hook of diffusers that notes its calls."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def pre_forward(self, module, *args, **kwargs):
        self.calls.add("around")
        return args, kwargs


class InPlace(diffusers.hooks.ModelHook):
    """A hook of diffusers that runs in place of the forward, and notes it."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def new_forward(self, module, *args, **kwargs):
        self.calls.add("in place")
        return self.fn_ref.original_forward(*args, **kwargs)


class Hooked:
    """A transformer on which hooks are switched on and off.

    Attributes:
        called: names of the hooks that were called in the last request.
    """

    def __init__(self):
        self.model = tiny.flux(double=1, single=2)
        self.blocks = counted(self.model)
        self.called = set()
        self.there = set()

    def switch(self, name):
        """Switch a hook or the cache on, or off where it is on."""
        is_on = name in self.there
        self.there ^= {name}
        registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(self.model)
        if name == "cache" and is_on:
            dbcache.disable(self.model)
        elif name == "cache":
            dbcache.enable(self.model, num_inference_steps=4, **OPTIONS)
        elif name == "accelerate" and is_on:
            accelerate.hooks.remove_hook_from_module(self.model)
        elif name == "accelerate":
            accelerate.hooks.add_hook_to_module(self.model, Noting(self.called))
        elif is_on:
            registry.remove_hook(name, recurse=False)
        else:
            kind = Around if name == "around" else InPlace
            registry.register_hook(kind(self.called), name)

    def run(self, steps=4):
        """Run a request; return its outputs, and how many blocks ran."""
        self.called.clear()
        self.blocks[0] = 0
        return tiny.denoise(self.model, FLUX, steps), self.blocks[0]


def held(model):
    """Return the methods of the cache that a module, or a hook on it, still holds."""
    found, ahead, seen = [], [vars(model)], set()
    while ahead:
        one = ahead.pop()
        if id(one) in seen or isinstance(one, torch.nn.Module | torch.Tensor | type):
            continue
        seen.add(id(one))
        found += [one] * isinstance(one, InstanceMethod)
        if isinstance(one, list | tuple | dict):
            ahead += one.values() if isinstance(one, dict) else one
        elif type(one).__module__.startswith(("diffusers", "functools")):
            ahead += [getattr(one, n) for n in KEPT if hasattr(one, n)]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_hooks_come_and_go_in_any_order(seed):
    rng = random.Random(seed)
    alone, hooked, plain = Hooked(), Hooked(), Hooked()
    uncached = alone.run()
    alone.switch("cache")
    cached = alone.run()
    assert cached[1] < uncached[1]
    for _ in range(12):
        name = rng.choice(["cache", "accelerate", "around", "in place"])
        hooked.switch(name)
        if name != "cache":
            plain.switch(name)
        try:
            plain.run(1)
        except AttributeError:
            break  # taken off in an order that accelerate and diffusers together do not bear
        outputs, blocks = hooked.run()
        want, most = cached if "cache" in hooked.there else uncached
        assert blocks == most
        assert same(outputs, want)
        assert hooked.called == plain.called
        if hooked.there == hooked.called:  # accelerate's removal drops those of diffusers over it
            assert held(hooked.model) == []


def test_the_cache_comes_back_where_someone_replaced_the_forward():
    """By ways that nobody can follow: known at the next request of a pipeline, and in `summary`."""
    pipe = pipeline()
    model = pipe.transformer
    calls = counted(model)
    own = model.forward
    model.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    enable(pipe)
    want, expected = tiny.generate(pipe, STEPS, guided=False), calls[0]
    for forward in (own, functools.partial(model.forward), lambda **kwargs: own(**kwargs)):
        model.forward, calls[0] = forward, 0
        assert same(tiny.generate(pipe, STEPS, guided=False), want)
        assert calls[0] == expected < STEPS * 6
    dbcache.disable(pipe)
    assert model.forward is forward

    dbcache.enable(model, num_inference_steps=STEPS, **OPTIONS)
    assert not any("replaced" in note for note in dbcache.summary(model).notes)
    model.forward = own
    assert any("replaced its forward" in note for note in dbcache.summary(model).notes)


def test_a_wrapper_of_the_forward_comes_back_after_a_hook_has_gone():
    class Wrapper:  # which passes attributes on, `__self__` too
        def __init__(self, wrapped):
            self.wrapped = wrapped

        def __getattr__(self, name):
            return getattr(self.wrapped, name)

        def __call__(self, *args, **kwargs):
            return self.wrapped(*args, **kwargs)

    model = tiny.flux()
    wrapper = model.forward = Wrapper(model.forward)
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    dbcache.enable(model)
    accelerate.hooks.remove_hook_from_module(model)
    dbcache.disable(model)
    assert model.forward is wrapper


@pytest.fixture
def weights_in_use(monkeypatch):
    """Make weights that are put back unusable until they are loaded; count the loads."""
    loads = []

    def tensors(group):
        return [x for m in group.modules for x in (*m.parameters(), *m.buffers())]

    def put_back(group):
        group.kept = getattr(group, "kept", None) or [x.clone() for x in tensors(group)]
        for x in tensors(group):
            x.data.fill_(torch.nan)

    def load(group):
        loads.append(group)
        for x, kept in zip(tensors(group), getattr(group, "kept", ()), strict=False):
            x.data.copy_(kept)

    monkeypatch.setattr(ModuleGroup, "onload_", load)
    monkeypatch.setattr(ModuleGroup, "offload_", put_back)
    return loads


CHOICES = {
    "F1B0": {},
    "F1B1": {"Bn_compute_blocks": 1},
    "no probe": {"Bn_compute_blocks": 1, "policy": "easycache"},
    "single last blocks": {"Bn_compute_blocks": 3, "Bn_compute_blocks_ids": [1]},
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("choice", CHOICES)
def test_groups_are_loaded_for_the_blocks_that_run_alone(weights_in_use, choice, size):
    pipe = pipeline()
    options = OPTIONS | CHOICES[choice]
    dbcache.enable(pipe, **options)
    want, pattern = tiny.generate(pipe, STEPS, guided=False), decisions(pipe)
    assert "c" in pattern[0]
    model = pipe.transformer
    model.enable_group_offload(CPU, CPU, num_blocks_per_group=size)
    blocks = [list(getattr(model, name)) for name in FLUX.lists]
    groups = [set(row[i : i + size]) for row in blocks for i in range(0, len(row), size)]
    ran = []
    for block in (*blocks[0], *blocks[1]):
        block.register_forward_pre_hook(lambda block, _: ran[-1].add(block))
    model.register_forward_pre_hook(lambda *_: ran.append(set()))
    weights_in_use.clear()
    assert same(tiny.generate(pipe, STEPS, guided=False), want)
    assert decisions(pipe) == pattern
    needed = sum(1 for step in ran for group in groups if group & step)
    loaded = [group for group in weights_in_use if any(set(group.modules) == g for g in groups)]
    assert len(loaded) == needed <= STEPS * len(groups)
    assert all(x.isnan().all() for group in loaded for x in group.modules[0].parameters())
