"""With threshold 0 a model is the plain one, and `disable` leaves no trace of the cache."""

from dataclasses import replace

import pytest
import torch
from engines import run_dbcache
from oracle import Rule
from tiny import FAMILIES, denoise, generate, pipeline

from dbcache import DBCacheConfig, disable, enable

pytestmark = pytest.mark.usefixtures("one_thread")

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@families
def test_threshold_0_is_bit_identical_to_the_plain_model_and_so_is_disable(family):
    model = family.build()
    plain = denoise(model, family, 20)
    rule = Rule(Fn_compute_blocks=2, Bn_compute_blocks=1, residual_diff_threshold=0.0, order=1)
    assert all(map(torch.equal, run_dbcache(model, family, rule, 20).outputs, plain))
    disable(model)
    run_dbcache(model, family, replace(rule, residual_diff_threshold=0.3), 20)
    disable(model)
    assert all(map(torch.equal, denoise(model, family, 20), plain))


@pytest.mark.parametrize("name", ["flux", "qwen", "wan", "wan2.2"])
def test_threshold_0_is_bit_identical_to_the_plain_pipeline_and_so_is_disable(name):
    pipe, family = pipeline(name), FAMILIES[name.removesuffix("2.2")]
    plain = generate(pipe, 20)
    rule = Rule(residual_diff_threshold=0.0)
    assert all(map(torch.equal, run_dbcache(pipe, family, rule, 20).outputs, plain))
    disable(pipe)
    run_dbcache(pipe, family, replace(rule, residual_diff_threshold=0.3), 20)
    disable(pipe)
    assert all(map(torch.equal, generate(pipe, 20), plain))


def shape_of(value) -> object:
    """Return a comparable picture of an attribute: containers by content, the rest by identity."""
    if isinstance(value, dict):
        return {key: shape_of(each) for key, each in value.items()}
    return value if isinstance(value, (int, str, bool, type(None))) else id(value)


def picture(root: torch.nn.Module) -> dict:
    """Return class, `__dict__` and hooks of every module below `root`."""
    return {
        name: (type(module), dict(vars(type(module))), shape_of(vars(module)))
        for name, module in root.named_modules()
    }


@families
def test_disable_leaves_no_trace_on_a_transformer(family):
    model = family.build()
    denoise(model, family, 1, named=True)
    before, state = picture(model), list(model.state_dict())
    run_dbcache(model, family, Rule(residual_diff_threshold=0.2), 8, named=True)
    assert list(model.state_dict()) == state
    disable(model)
    assert picture(model) == before


@pytest.mark.parametrize("name", ["flux", "qwen", "wan", "wan2.2"])
def test_disable_leaves_no_trace_on_a_pipeline(name):
    pipe, family = pipeline(name), FAMILIES[name.removesuffix("2.2")]
    parts = [pipe.transformer, *filter(None, [getattr(pipe, "transformer_2", None)])]
    generate(pipe, 6)
    before = [picture(part) for part in parts]
    attributes, methods = set(vars(pipe)), dict(vars(type(pipe)))
    kind = type(pipe)
    base_methods = dict(vars(kind.__mro__[1]))
    run_dbcache(pipe, family, Rule(residual_diff_threshold=0.2), 6)
    disable(pipe)
    assert [picture(part) for part in parts] == before
    assert set(vars(pipe)) == attributes
    assert type(pipe) is kind
    assert dict(vars(kind)) == methods
    assert dict(vars(kind.__mro__[1])) == base_methods


@families
def test_enable_alone_touches_no_weights_names_or_hooks(family):
    model = family.build()
    names = [name for name, _ in model.named_modules()]
    weights = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    enable(model, cache_config=DBCacheConfig(Fn_compute_blocks=1))
    assert [name for name, _ in model.named_modules()] == names
    assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == weights
    disable(model)
