"""Adapters that users register by the name of a class."""

import pytest
import tiny
import torch

import dbcache
from dbcache import BlockAdapter, BlockAdapterRegistry, ForwardPattern


class Trunk(torch.nn.Module):
    """A model that no table knows."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(6)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TrunkLarge(Trunk):
    pass


@pytest.fixture
def register():
    names = []

    def add(name, factory):
        names.append(name)
        return BlockAdapterRegistry.register(name)(factory)

    yield add
    for name in names:
        BlockAdapterRegistry.unregister(name)


def adapter(transformer, **kwargs):
    return BlockAdapter(
        transformer=transformer,
        blocks=transformer.layers,
        forward_pattern=ForwardPattern.HIDDEN_TO_HIDDEN,
        **kwargs,
    )


def test_registered_class_is_cached_and_left_without_a_trace(register):
    model, x = Trunk(), torch.ones(2, 4)
    with pytest.raises(ValueError, match="must be a supported one"):
        dbcache.enable(model)
    assert register("Trunk", adapter) is adapter
    plain = model(x)
    dbcache.enable(model, Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1.0)
    for _ in range(3):
        torch.testing.assert_close(model(x), plain)
    assert dbcache.summary(model).lanes[0].cached_steps == [1, 2]
    dbcache.disable(model)
    assert torch.equal(model(x), plain)
    assert "_dbcache" not in model.__dict__


def test_longest_name_wins_and_subclasses_count(register):
    calls = []
    register("Trunk", lambda target, **kwargs: calls.append("short") or adapter(target))
    dbcache.enable(TrunkLarge(), Fn_compute_blocks=1)
    register("TrunkLa", lambda target, **kwargs: calls.append("long") or adapter(target))
    dbcache.enable(TrunkLarge(), Fn_compute_blocks=1)
    dbcache.enable(type("Mine", (TrunkLarge,), {})(), Fn_compute_blocks=1)
    assert calls == ["short", "long", "long"]


def test_registered_pipeline_comes_before_the_table_and_opens_requests(register):
    pipe = tiny.pipeline("qwen")
    register(
        type(pipe).__name__,
        lambda pipe, **kwargs: BlockAdapter(
            pipe=pipe,
            blocks=pipe.transformer.transformer_blocks,
            forward_pattern=ForwardPattern.Pattern_1,
            params_modifiers=dbcache.ParamsModifier(
                cache_config=dbcache.DBCacheConfig(max_warmup_steps=3)
            ),
        ),
    )
    dbcache.enable(pipe, Fn_compute_blocks=1, residual_diff_threshold=1.0)
    for _ in range(2):
        tiny.generate(pipe, 5)
        assert [lane.cached_steps for lane in dbcache.summary(pipe).lanes] == [[3, 4], [3, 4]]


def test_function_that_returns_something_else_is_refused(register):
    register("Trunk", lambda target, **kwargs: "blocks")
    model = Trunk()
    with pytest.raises(TypeError, match="'Trunk' must return a BlockAdapter, got 'blocks'"):
        dbcache.enable(model)
    assert "_dbcache" not in model.__dict__


def test_wrong_use_is_refused():
    with pytest.raises(TypeError, match="name must be that of a class"):
        BlockAdapterRegistry.register(adapter)
    with pytest.raises(TypeError, match="must decorate a function"):
        BlockAdapterRegistry.register("Trunk")(None)
