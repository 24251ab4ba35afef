"""Every transformer class of the installed diffusers has a row, or a reason why it has none."""

import importlib
import inspect
import pkgutil
import re
import types

import diffusers
import pytest
import tiny
import torch
from diffusers.models import transformers
from diffusers.models.modeling_utils import ModelMixin

import dbcache
from dbcache.adapters.models import lookup as registry
from dbcache.adapters.models.table import MODELS, REFUSED


def transformer_classes():
    """Return the transformer classes with lists of blocks, by name.

    These are all models that live in `diffusers.models.transformers`, and what diffusers exports
    elsewhere under a name that says transformer.
    """
    modules = [
        importlib.import_module(f"{transformers.__name__}.{info.name}")
        for info in pkgutil.iter_modules(transformers.__path__)
    ]
    found = {
        cls
        for module in modules
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__
    }
    found |= {
        getattr(diffusers, name)
        for name in dir(diffusers)
        if any(word in name for word in ("Transformer", "DiT", "UVit"))
        and "Pipeline" not in name
        and "ControlNet" not in name
    }
    return {
        cls.__name__: cls
        for cls in found
        if inspect.isclass(cls) and issubclass(cls, ModelMixin) and _has_list(cls)
    }


def _has_list(cls):
    return "ModuleList" in inspect.getsource(cls)


CLASSES = transformer_classes()


def test_there_are_transformer_classes():
    assert {"FluxTransformer2DModel", "UVit2DModel", "PriorTransformer"} <= CLASSES.keys()
    assert len(CLASSES) > 30


def test_every_class_has_a_row_or_a_reason():
    known = {row.transformer for row in MODELS} | REFUSED.keys()
    missing = [
        name for name, cls in CLASSES.items() if not known & {base.__name__ for base in cls.__mro__}
    ]
    assert sorted(missing) == []


def test_no_class_has_both_a_row_and_a_reason():
    assert not {row.transformer for row in MODELS} & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_class_and_its_subclasses_are_refused_with_the_reason(name):
    base = type(name, (torch.nn.Module,), {})
    for model in (base(), type("Mine", (base,), {})()):
        with pytest.raises(ValueError, match=re.escape(f"{name} {REFUSED[name]}")):
            dbcache.enable(model)


def test_the_nearest_class_counts(monkeypatch):
    row = MODELS[0].transformer
    monkeypatch.setitem(registry.REFUSED, "Odd", "is odd")
    base = type(row, (torch.nn.Module,), {})
    odd = type("Odd", (base,), {})
    back = type(row, (odd,), {})
    assert [registry.refusal_of(cls()) for cls in (base, odd, back)] == [None, "Odd is odd", None]
    assert [registry.row_of(cls()) for cls in (base, odd, back)] == [MODELS[0], None, MODELS[0]]


def test_a_refused_part_of_a_pipeline_leaves_its_other_parts_to_the_cache(monkeypatch):
    monkeypatch.setitem(registry.REFUSED, "Odd", "is odd")
    odd = type("Odd", (torch.nn.Module,), {})()
    pipe = types.SimpleNamespace(transformer=tiny.flux(), helper=odd)
    assert [spec.transformer for spec in registry.find_specs(pipe)] == [pipe.transformer]
    del pipe.transformer
    with pytest.raises(ValueError, match="cannot be cached: Odd is odd"):
        registry.find_specs(pipe)


def test_every_unet_is_refused():
    unets = {name for name in dir(diffusers) if "UNet" in name and name.endswith(("Model", "UNet"))}
    assert unets <= REFUSED.keys()
    assert "UNetMotionModel" in unets
