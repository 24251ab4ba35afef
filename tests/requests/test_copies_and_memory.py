"""Pipelines made of enabled ones, what is freed after `disable`, and what many requests leave."""

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter
from typing import ClassVar

import pytest
import tiny
import torch
from diffusers import FluxPipeline
from graph_runs import Step, one_stream
from together import OPTIONS, decisions, in_threads, same

import dbcache
from dbcache.adapters.pipelines import switch
from dbcache.adapters.requests.cached_transformer import CachedTransformer

CACHED = OPTIONS | {"residual_diff_threshold": 0.3}


def draw(pipe, seed=5):
    return tiny.generate(pipe, 6, guided=False, seed=seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.filterwarnings("ignore:.*outside of a call of the pipeline")
@pytest.mark.parametrize("made", ["type(pipe)(**components)", "from_pipe"])
def test_a_pipeline_made_of_an_enabled_one_is_plain_and_works(made):
    pipe = quiet(FluxPipeline(**tiny.pipeline("flux").components))
    plain = draw(pipe)
    dbcache.enable(pipe, **CACHED)
    cached = draw(pipe)
    twin = type(pipe)(**pipe.components) if made != "from_pipe" else pipe.from_pipe(pipe)
    assert type(twin) is FluxPipeline
    assert "_dbcache" not in vars(twin)
    assert twin.transformer is pipe.transformer
    assert same(draw(quiet(twin)), plain)
    assert same(draw(pipe), cached)
    assert isinstance(pipe, FluxPipeline)
    dbcache.enable(twin, **CACHED)
    dbcache.disable(pipe)
    assert same(draw(twin), cached)
    dbcache.disable(twin)
    assert same(draw(twin), plain)


class Registered:
    """Classes of pipelines that want an argument of their subclasses, and keep a list of them."""

    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, *, name, **more):
        super().__init_subclass__(**more)
        Registered.known.append(cls)


def test_a_class_whose_subclasses_need_an_argument():
    class Own(FluxPipeline, Registered, name="own"):
        pass

    known = list(Registered.known)
    pipe = quiet(Own(**tiny.pipeline("flux").components))
    plain = draw(pipe)
    dbcache.enable(pipe, **CACHED)
    assert type(pipe) is not Own
    draw(pipe)
    assert "c" in decisions(pipe)[0]
    dbcache.disable(pipe)
    assert type(pipe) is Own
    assert Registered.known == known
    assert same(draw(pipe), plain)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_second_transformer_that_cannot_be_switched_on_leaves_the_first_as_it_was(
    monkeypatch, kind
):
    pipe = tiny.pipeline("wan2.2")
    plain = tiny.generate(pipe, 6)
    models = [pipe.transformer, pipe.transformer_2]
    names, cls = [set(vars(model)) for model in models], type(pipe)
    change = CachedTransformer.change

    def fail(self, enabled):
        if self.module is pipe.transformer_2 and enabled.latest is not None:
            raise kind("no")
        change(self, enabled)

    monkeypatch.setattr(CachedTransformer, "change", fail)
    with pytest.raises(kind):
        dbcache.enable(pipe, **CACHED)
    monkeypatch.undo()
    assert not dbcache.is_enabled(pipe)
    assert type(pipe) is cls
    assert [set(vars(model)) for model in models] == names
    monkeypatch.setenv("DBCACHE_KERNELS", "reference")
    assert same(tiny.generate(pipe, 6), plain)
    assert switch.handle_of(pipe.transformer) is None


@pytest.mark.parametrize("ends", ["disabled", "left on"])
def test_models_and_classes_made_at_run_time_are_freed(ends):
    class Block(Step):
        pass

    class Model(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.blocks = torch.nn.ModuleList(block(seed) for seed in range(4))

        def forward(self, hidden_states):
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return hidden_states

    class Pipe:
        def __init__(self, transformer):
            self.transformer = transformer

        def __call__(self, x):
            return self.transformer(x)

    pipe = Pipe(Model(Block))
    with torch.no_grad():
        adapter = one_stream(pipe.transformer)
        adapter.pipe = pipe
        dbcache.enable(adapter, **CACHED)
        pipe(tiny.noise(1, 4, 4, seed=1))
        if ends == "disabled":
            dbcache.disable(adapter)
    gone = [weakref.ref(x) for x in (Pipe, Model, Block, pipe, pipe.transformer)]
    del pipe, adapter, Pipe, Model, Block
    for _ in range(3):
        gc.collect()
    assert [x() for x in gone] == [None] * len(gone)


class Nested(torch.nn.Module):
    """A model whose list of blocks lies in a part of it."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Module()
        self.backbone.blocks = torch.nn.ModuleList(Step(seed) for seed in range(5))

    def forward(self, hidden_states, timestep=None):
        for block in self.backbone.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_inside_a_forward_of_a_model_with_nested_blocks(copied):
    model = Nested()
    x = tiny.noise(1, 4, 4, seed=1)
    plain, own = model(x), set(vars(model.backbone))
    adapter = _adapter(model)
    dbcache.enable(adapter, **CACHED)
    copies = []

    def keep(*_):
        hooks = dict(block._forward_hooks)
        block._forward_hooks.clear()
        copies.append(copied(model))
        block._forward_hooks.update(hooks)

    block = model.backbone.blocks[0]
    hook = block.register_forward_hook(keep)
    model(x)
    hook.remove()
    twin = copies[0]
    assert set(vars(twin.backbone)) == own
    assert set(vars(twin)) == set(vars(Nested()))
    assert torch.equal(twin(x), plain)
    dbcache.disable(adapter)
    assert set(vars(model.backbone)) == own


def _adapter(model):
    return dbcache.BlockAdapter(
        transformer=model,
        blocks=model.backbone.blocks,
        forward_pattern=dbcache.ForwardPattern.Pattern_3,
    )


def census():
    """Return the number of objects, of tensors, and the tensors' bytes."""
    gc.collect()
    # asking a tensor for its storage, as below, leaves an object with the storage
    objects = [x for x in gc.get_objects() if type(x) is not torch.UntypedStorage]
    tensors = [x for x in objects if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    kinds = Counter(type(x).__qualname__ for x in objects)
    return len(objects), len(tensors), sum(storages.values()), kinds


@pytest.mark.parametrize(
    "options",
    [CACHED, CACHED | {"Bn_compute_blocks": 3, "Bn_compute_blocks_ids": [1]}],
    ids=["whole", "last blocks"],
)
@torch.no_grad()
def test_a_step_keeps_no_activations_until_the_next_collection(options):
    model, made = dbcache.enable(tiny.flux(), **options), []
    model.transformer_blocks[0].register_forward_hook(
        lambda _module, _given, output: made.append(weakref.ref(output[1]))
    )
    given = tiny.FAMILIES["flux"].arguments(tiny.noise(1, 16, 16, seed=1), 0.5, "cond")
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            model(**given)
    finally:
        gc.enable()
    assert len(made) == 4
    assert [x() for x in made] == [None] * 4


@torch.no_grad()
def test_three_hundred_requests_of_varying_shape_leave_nothing_behind():
    count = 300
    model = Nested()
    dbcache.enable(_adapter(model), **CACHED, cuda_graph=False)
    numbers, lock = iter(range(count)), threading.Lock()
    counts = {}

    def image(number):
        x = tiny.noise(1 + number % 2, 4 + number % 7, 4, seed=number)
        request = dbcache.start_request(
            model, num_inference_steps=4, residual_diff_threshold=0.1 * (number % 3)
        )
        for step in range(4):
            with request.branch("cond"):
                x = model(x, timestep=1.0 - step / 4)
            with request.branch("uncond"):
                model(x, timestep=1.0 - step / 4)
        if number % 10:
            request.close()

    def work(most):
        while True:
            with lock:
                number = next(numbers, None) if served[0] < most else None
                served[0] += number is not None
            if number is None:
                return
            image(number)

    served = [0]
    for most in (50, count):
        in_threads([lambda m=most: work(m)] * 3)
        gc.collect()  # requests that were dropped are gone
        image(1)  # alone: one set of lanes stays at hand, however the threads' timing was
        counts[most] = census()
    objects, tensors, nbytes, kinds = counts[50]
    after_objects, after_tensors, after_nbytes, after_kinds = counts[count]
    grown = (after_kinds - kinds).most_common(8)
    assert after_tensors <= tensors + 100, grown
    assert after_nbytes <= nbytes + 20_000, grown
    assert after_objects <= objects + 400, grown
