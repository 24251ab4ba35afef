"""PatchFunctor: what it changes lasts as long as the cache is on, on the instance alone."""

import copy
import types

import pytest
import tiny
import torch

import dbcache
from dbcache import BlockAdapter, BlockAdapterRegistry, ForwardPattern, PatchFunctor

FORCED = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 1.0}


class Layer(torch.nn.Linear):
    """A block that follows no pattern: it takes a state and returns three things."""

    def forward(self, state):
        hidden = state["hidden"] + super().forward(state["hidden"]).tanh()
        return hidden, len(state), {"scale": state["scale"] * 0.9}


class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(4, 4) for _ in range(6)])
        self.norm = torch.nn.LayerNorm(4)
        tiny.fill(self, 0)

    def forward(self, x):
        state = {"hidden": x, "scale": 1.0}
        for layer in self.layers:
            hidden, _, more = layer(state)
            state = {"hidden": hidden, **more}
        return self.norm(state["hidden"]) * state["scale"]


def one_stream(self, hidden_states):
    return self.__class__.forward(self, {"hidden": hidden_states, "scale": 1.0})[0]


def loop(self, x):
    for layer in self.layers:
        x = layer(x)
    return self.norm(x) * 0.9 ** len(self.layers)


class OneStream(PatchFunctor):
    """Makes the blocks follow Pattern_3, and the loop call them so."""

    def __init__(self):
        self.calls = 0

    def apply(self, transformer):
        self.calls += 1
        for layer in transformer.layers:
            layer.forward = types.MethodType(one_stream, layer)
        transformer.forward = types.MethodType(loop, transformer)
        return transformer


def adapter(model, functor, **fields):
    return BlockAdapter(
        transformer=model,
        blocks=model.layers,
        forward_pattern=ForwardPattern.Pattern_3,
        patch_functor=functor,
        **fields,
    )


def state_of(model):
    """Return all that a patch might change, by identity."""
    found = {}
    for path, module in model.named_modules():
        found[path] = type(module), dict(module.__dict__)
        for name, value in module.__dict__.items():
            if isinstance(value, dict | list | set):
                found[path, name] = list(value.items() if isinstance(value, dict) else value)
    return found


X = tiny.noise(2, 3, 4, seed=1)


@torch.no_grad()
def test_blocks_of_no_pattern_are_cached_and_given_back_as_they_were():
    model, functor = Odd(), OneStream()
    plain, before, members = model(X), state_of(model), dict(vars(Layer))
    dbcache.enable(adapter(model, None), **FORCED)
    with pytest.raises(TypeError, match=r"must be a tensor, got dict; .* need a patch_functor"):
        model(X)
    dbcache.disable(model)
    dbcache.enable(adapter(model, functor), **FORCED)
    for _ in range(3):
        torch.testing.assert_close(model(X), plain, rtol=1e-5, atol=1e-6)
    assert dbcache.summary(model).lanes[0].cached_steps == [1, 2]
    assert state_of(model) != before
    dbcache.disable(model)
    assert state_of(model) == before
    assert dict(vars(Layer)) == members
    assert torch.equal(model(X), plain)
    assert functor.calls == 1


@torch.no_grad()
def test_real_model_runs_as_if_it_were_patched_by_hand():
    """Blocks with a gain on what they add, in the manner of layer scaling."""

    def gain(transformer):
        for block in transformer.transformer_blocks:
            own = block.forward

            def forward(hidden_states, encoder_hidden_states, *args, own=own, **kwargs):
                encoder, hidden = own(hidden_states, encoder_hidden_states, *args, **kwargs)
                return encoder, hidden_states + 0.5 * (hidden - hidden_states)

            block.forward = forward

    family = tiny.FAMILIES["qwen"]
    model, by_hand = family.build(), family.build()
    plain, before = tiny.denoise(model, family, 5), state_of(model)
    gain(by_hand)
    expected = tiny.denoise(by_hand, family, 5)
    assert not torch.equal(expected[0], plain[0])
    where = {"blocks": model.transformer_blocks, "forward_pattern": ForwardPattern.Pattern_1}
    described = BlockAdapter(transformer=model, patch_functor=gain, **where)
    dbcache.enable(described, Fn_compute_blocks=1, residual_diff_threshold=0.0)
    assert all(map(torch.equal, tiny.denoise(model, family, 5), expected))
    settings = {**FORCED, "enable_separate_cfg": False}
    dbcache.enable(by_hand, **settings)
    dbcache.enable(described, **settings)
    outputs = tiny.denoise(by_hand, family, 5)
    assert all(map(torch.equal, tiny.denoise(model, family, 5), outputs))
    dbcache.disable(described)
    assert state_of(model) == before
    assert all(map(torch.equal, tiny.denoise(model, family, 5), plain))


def everything(transformer):
    """Change all kinds of things."""
    transformer.extra = torch.nn.Linear(2, 2)
    transformer.register_buffer("shift", torch.zeros(1), persistent=False)
    transformer.norm.register_forward_hook(lambda *_: None)
    del transformer.norm.eps
    first = transformer.layers[0]
    first.weight = torch.nn.Parameter(first.weight * 2)
    del transformer.norm
    transformer.norm = torch.nn.Identity()
    first.__class__ = type("Other", (Layer,), {})
    OneStream().apply(transformer)


@torch.no_grad()
def test_modules_parameters_buffers_hooks_and_classes_of_instances_are_given_back():
    model = Odd()
    plain, before = model(X), state_of(model)
    dbcache.enable(adapter(model, everything), **FORCED)
    assert (type(model.norm), type(model.layers[0]).__name__) == (torch.nn.Identity, "Other")
    assert model.shift.shape == (1,)
    assert not torch.allclose(model(X), plain)
    dbcache.disable(model)
    assert state_of(model) == before
    assert list(model._modules) == ["layers", "norm"]
    assert torch.equal(model(X), plain)


def raises_halfway(transformer):
    transformer.layers[0].forward = types.MethodType(one_stream, transformer.layers[0])
    raise RuntimeError("no such layer")


def makes_blocks_too_narrow(transformer):
    for layer in transformer.layers:
        layer.forward = lambda: None


@pytest.mark.parametrize(
    ("functor", "error", "text"),
    [
        (raises_halfway, RuntimeError, "no such layer"),
        (makes_blocks_too_narrow, ValueError, r"layers\[0\] \(Layer\).*must take"),
        (lambda transformer: torch.nn.Identity(), TypeError, "return the transformer or None, ret"),
        (OneStream, TypeError, "must be a PatchFunctor .* make an instance of it"),
        ("OneStream", TypeError, "must be a PatchFunctor or a function"),
        (PatchFunctor(), NotImplementedError, "PatchFunctor must define apply"),
    ],
)
@torch.no_grad()
def test_an_enable_that_fails_leaves_everything_as_it_was(functor, error, text):
    fresh = Odd()
    before, plain = state_of(fresh), fresh(X)
    with pytest.raises(error, match=text):
        dbcache.enable(adapter(fresh, functor), **FORCED)
    assert state_of(fresh) == before
    enabled = Odd()
    dbcache.enable(adapter(enabled, OneStream()), **FORCED)
    cached = enabled(X)
    with pytest.raises(error, match=text):
        dbcache.enable(adapter(enabled, functor), **FORCED)
    torch.testing.assert_close(enabled(X), cached, rtol=1e-5, atol=1e-6)
    assert dbcache.summary(enabled).lanes[0].cached_steps == [1]
    dbcache.disable(enabled)
    assert torch.equal(enabled(X), plain)


def test_a_functor_that_fails_on_the_second_transformer_leaves_the_first_as_it_was():
    pair = [Odd(), Odd()]
    before = [state_of(model) for model in pair]

    def only_one(transformer):
        if transformer is pair[1]:
            raise RuntimeError("not this one")
        OneStream().apply(transformer)

    with pytest.raises(RuntimeError, match="not this one"):
        dbcache.enable(
            BlockAdapter(
                transformer=pair,
                blocks=[model.layers for model in pair],
                forward_pattern=ForwardPattern.Pattern_3,
                patch_functor=only_one,
            )
        )
    assert [state_of(model) for model in pair] == before


def test_a_changed_class_is_refused_and_restored():
    def on_the_class(transformer):
        Layer.forward = one_stream
        Layer.added = True

    model, members = Odd(), dict(vars(Layer))
    with pytest.raises(TypeError, match=r"changed Layer\.forward, Layer\.added; set them on the i"):
        dbcache.enable(adapter(model, on_the_class))
    assert dict(vars(Layer)) == members


@torch.no_grad()
def test_enabling_again_replaces_the_patch_and_refreshing_keeps_it():
    model = Odd()
    plain, before = model(X), state_of(model)
    dbcache.enable(adapter(model, OneStream()), **FORCED)
    model(X)

    def doubled(transformer):
        OneStream().apply(transformer)
        inner = transformer.forward
        transformer.forward = lambda x: 2 * inner(x)

    dbcache.enable(adapter(model, doubled), **FORCED)
    torch.testing.assert_close(model(X), 2 * plain, rtol=1e-5, atol=1e-6)
    dbcache.refresh_context(model, max_warmup_steps=3)
    torch.testing.assert_close(model(X), 2 * plain, rtol=1e-5, atol=1e-6)
    dbcache.enable(adapter(model, OneStream()), **FORCED)
    torch.testing.assert_close(model(X), plain, rtol=1e-5, atol=1e-6)
    dbcache.disable(model)
    assert state_of(model) == before


@torch.no_grad()
def test_what_others_set_in_the_meantime_stays():
    model = Odd()
    dbcache.enable(adapter(model, OneStream()), **FORCED)
    mine = lambda state: (state["hidden"], 0, {"scale": 1.0})  # noqa: E731 - an attribute
    model.layers[2].forward = mine
    model.layers[3].note = "kept"
    dbcache.disable(model)
    assert model.layers[2].forward is mine
    assert model.layers[3].note == "kept"
    assert "forward" not in model.layers[3].__dict__


@torch.no_grad()
def test_hooks_of_accelerate_over_the_patch_survive_it():
    hooks = pytest.importorskip("accelerate.hooks")
    model = Odd()
    plain = model(X)
    dbcache.enable(adapter(model, OneStream()), **FORCED)
    for module in (model.layers[4], model):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    torch.testing.assert_close(model(X), plain, rtol=1e-5, atol=1e-6)
    dbcache.disable(model)
    assert torch.equal(model(X), plain)
    for module in (model.layers[4], model):
        hooks.remove_hook_from_module(module)
    assert torch.equal(model(X), plain)


@torch.no_grad()
def test_registered_adapter_brings_its_functor():
    BlockAdapterRegistry.register("Odd")(lambda model, **_: adapter(model, OneStream()))
    try:
        model = Odd()
        before, plain = state_of(model), model(X)
        dbcache.enable(model, **FORCED)
        model(X)
        torch.testing.assert_close(model(X), plain, rtol=1e-5, atol=1e-6)
        assert dbcache.summary(model).lanes[0].cached_steps == [1]
        dbcache.disable(model)
        assert state_of(model) == before
    finally:
        BlockAdapterRegistry.unregister("Odd")


@torch.no_grad()
def test_pattern_is_found_from_the_patched_forward():
    model = Odd()
    plain = model(X)
    found = BlockAdapter(transformer=model, auto=True, patch_functor=OneStreamNamed())
    dbcache.enable(found, **FORCED)
    model(X)
    torch.testing.assert_close(model(X), plain, rtol=1e-5, atol=1e-6)
    (lane,) = dbcache.summary(model).lanes
    assert (lane.stack, lane.cached_steps) == ("layers", [1])


class OneStreamNamed(OneStream):
    def apply(self, transformer):
        super().apply(transformer)

        def forward(self, hidden_states):
            hidden_states = one_stream(self, hidden_states)
            return hidden_states

        for layer in transformer.layers:
            layer.forward = types.MethodType(forward, layer)


@torch.no_grad()
def test_copies_of_a_patched_model_run():
    model = Odd()
    plain = model(X)
    dbcache.enable(adapter(model, OneStream()), **FORCED)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(X), plain, rtol=1e-5, atol=1e-6)
    assert twin.layers[0].forward.__self__ is twin.layers[0]
