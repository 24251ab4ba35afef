"""Compiled models: blocks run compiled, whatever is compiled, and when; nothing compiles twice."""

from __future__ import annotations

import copy
import logging

import models
import pytest
import tiny
import torch
import torch._dynamo

import dbcache

STEPS = 8
ONE_PROBE = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 0.6,
    "num_inference_steps": STEPS,
    "enable_separate_cfg": False,  # else calls of Wan's are two branches in turn
}


class Counting:
    """A backend that runs graphs as they are and counts.

    Attributes:
        graphs: how many were compiled; calls: how often they ran.
    """

    def __init__(self):
        self.graphs = self.calls = 0

    def __call__(self, graph, _inputs, **_options):
        self.graphs += 1

        def run(*args):
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend():
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield Counting()


def small(name):
    return tiny.wan(layers=4) if name == "wan" else tiny.flux(double=1, single=3)


def whole(model, **options):
    return torch.compile(model, **options)


def in_place(model, **options):
    model.compile(**options)
    return model


def its_forward(model, **options):
    model.forward = torch.compile(model.forward, **options)
    return model


def regional(model, **options):
    model.compile_repeated_blocks(fullgraph=True, **options)
    return model


def ours(model, **options):
    return dbcache.compile(model, fullgraph=True, **options)


WAYS = [whole, in_place, its_forward, regional, ours]


@pytest.mark.parametrize("enables_first", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("how", WAYS, ids=lambda how: how.__name__)
def test_blocks_run_compiled_on_full_steps(backend, how, enables_first):
    family = tiny.FAMILIES["wan"]
    model, twin = small("wan"), small("wan")
    dbcache.enable(twin, **ONE_PROBE)
    if enables_first:
        dbcache.enable(model, **ONE_PROBE)
        run = how(model, backend=backend)
    else:
        run = how(model, backend=backend)
        assert dbcache.enable(run, **ONE_PROBE) is run
    calls = []
    for _ in range(3):
        mine, theirs = tiny.denoise(run, family, STEPS), tiny.denoise(twin, family, STEPS)
        assert all(map(torch.equal, mine, theirs))
        calls.append(backend.calls)
        assert backend.graphs == 1
    cached = len(dbcache.summary(run, logging=False).lanes[0].cached_steps)
    assert cached > 1
    each = (STEPS - cached) * 4 + cached  # one probe block
    assert calls == [each, 2 * each, 3 * each]
    dbcache.disable(run)
    is_regional = how in (regional, ours)
    assert all(("_compiled_call_impl" in vars(b)) == is_regional for b in model.blocks)
    mine, plain = tiny.denoise(run, family, 1), tiny.denoise(small("wan"), family, 1)
    torch.testing.assert_close(mine, plain)
    assert backend.calls == calls[-1] + (4 if is_regional else 1)  # compiled as it was


def test_a_pipeline_with_a_compiled_transformer(backend, caplog):
    pipe, twin = tiny.pipeline("flux"), tiny.pipeline("flux")
    module, twin.transformer = small("flux"), small("flux")
    dbcache.enable(twin, **ONE_PROBE)
    pipe.transformer = torch.compile(module, backend=backend)
    with caplog.at_level(logging.INFO, "dbcache"):
        dbcache.enable(pipe, **ONE_PROBE)
    assert "its blocks are compiled instead" in caplog.text
    expected = tiny.generate(twin, STEPS)
    assert all(map(torch.equal, tiny.generate(pipe, STEPS), expected))
    graphs, calls = backend.graphs, backend.calls
    assert calls > 20
    pipe.transformer = torch.compile(module, backend=backend)  # again, while the cache is on
    assert all(map(torch.equal, tiny.generate(pipe, STEPS), expected))
    assert backend.calls == 2 * calls
    assert backend.graphs <= 2 * graphs
    dbcache.disable(pipe)
    tiny.generate(pipe, 2, guided=False)
    assert backend.calls == 2 * calls + 2  # as a whole


def test_other_options_later_take_the_place_of_earlier_ones(backend):
    family, other = tiny.FAMILIES["wan"], Counting()
    model = dbcache.enable(small("wan"), Fn_compute_blocks=1, residual_diff_threshold=0.0)
    tiny.denoise(in_place(model, backend=backend), family, 2)
    tiny.denoise(in_place(model, backend=other), family, 2)
    assert (backend.calls, other.calls) == (8, 8)
    tiny.denoise(whole(model, backend=backend), family, 2)
    assert (backend.calls, other.calls) == (16, 8)
    model.blocks[3] = copy.deepcopy(model.blocks[3])  # is compiled, too

    @torch.compile(backend=other)
    def step(**arguments):
        return model(**arguments)

    step.parameters = model.parameters
    tiny.denoise(step, family, 2)
    assert (backend.calls, other.calls) == (16, 16)
    dbcache.disable(model)
    assert not any("_compiled_call_impl" in vars(block) for block in model.blocks)


def test_one_graph_over_decisions_is_refused(backend):
    one = {"backend": backend, "fullgraph": True}
    pattern = r"fullgraph=True; compile its blocks, as in dbcache.compile\(pipe\)"
    for how in (whole, in_place, its_forward):
        run = how(small("wan"), **one)
        with pytest.raises(ValueError, match=pattern):
            dbcache.enable(run, Fn_compute_blocks=1)
        assert not dbcache.is_enabled(run)
        tiny.denoise(run, tiny.FAMILIES["wan"], 1)
        assert backend.calls == 1  # as it was
        backend.calls = 0
    pipe = tiny.pipeline("flux")
    pipe.transformer = torch.compile(pipe.transformer, **one)
    with pytest.raises(ValueError, match=pattern):
        dbcache.enable(pipe)
    model = dbcache.enable(small("wan"), **ONE_PROBE)
    for run in (whole(model, **one), in_place(model, **one)):
        with pytest.raises(torch._dynamo.exc.Unsupported) as raised:
            tiny.denoise(run, tiny.FAMILIES["wan"], 1)
        assert "reason: dbcache decides on each step" in str(raised.value)
        assert "dbcache.compile(pipe)" in str(raised.value)


def test_dynamic_shapes_need_no_second_graph(backend):
    model = dbcache.compile(dbcache.enable(small("wan"), **ONE_PROBE), backend=backend)
    assert torch._dynamo.config.recompile_limit >= 64
    for width, height in ((8, 20), (16, 8), (12, 16)):
        family = tiny.Family("wan", tiny.wan, ("blocks",), None, (1, 4, 3, width, height))
        tiny.denoise(model, family, STEPS)
        assert backend.graphs == 1


@pytest.mark.parametrize(
    "name",
    [
        "SD3Transformer2DModel",
        "LTXVideoTransformer3DModel",
        "ZImageTransformer2DModel",
        "HunyuanVideoTransformer3DModel",
    ],
)
def test_every_block_of_other_families_is_compiled(backend, name):
    model = copy.deepcopy(models.model(name))
    dbcache.compile(model, backend=backend)
    compiled = {id(m) for m in model.modules() if "_compiled_call_impl" in vars(m)}
    stacks = models.stacks_of(name, model)
    assert {id(block) for stack in stacks for block in stack} <= compiled
    repeated = set(getattr(model, "_repeated_blocks", None) or ())
    assert repeated <= {type(m).__name__ for m in model.modules() if id(m) in compiled}


def test_what_has_no_blocks_is_refused():
    with pytest.raises(ValueError, match="must be a supported one, got Linear"):
        dbcache.compile(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="compile: fullgraph must be True or False, got 1"):
        dbcache.compile(tiny.flux(), fullgraph=1)


def test_copies_are_not_compiled(backend):
    model = in_place(dbcache.enable(small("wan"), **ONE_PROBE), backend=backend)
    twin = copy.deepcopy(model)  # before the first call moves it to the blocks
    tiny.denoise(twin, tiny.FAMILIES["wan"], 1)
    assert backend.calls == 0
    tiny.denoise(model, tiny.FAMILIES["wan"], 1)
    tiny.denoise(copy.deepcopy(model), tiny.FAMILIES["wan"], 1)
    assert backend.calls == 4


def test_blocks_with_graphs_of_their_own_are_told_what_a_step_is(backend, monkeypatch):
    told = []
    monkeypatch.setattr(
        "dbcache.adapters.requests.request.cudagraph_mark_step_begin", lambda: told.append(1)
    )
    backend.get_compiler_config = lambda: {"triton.cudagraphs": True}
    for each, expected in ((backend, 1 + STEPS), (Counting(), 0)):
        model = torch._dynamo.optimize(each)(small("wan"))
        dbcache.enable(model, **ONE_PROBE)
        tiny.denoise(model, tiny.FAMILIES["wan"], STEPS)
        assert len(told) == expected
        told.clear()


def test_configs_are_those_of_cache_dit():
    cache_dit = pytest.importorskip("cache_dit", minversion="1.5.3")
    import torch._inductor.config as inductor

    found = []
    for call in (cache_dit.set_compile_configs, dbcache.set_compile_configs):
        for options in (
            {},
            {"descent_tuning": False, "capture_scalar_outputs": True},
            {"cuda_graphs": True, "epilogue_prologue_fusion": True},
            {"ulysses_anything": True, "force_disable_compile_caches": True},
        ):
            with torch._dynamo.config.patch(), inductor.patch():
                before = torch._dynamo.config.get_config_copy(), inductor.get_config_copy()
                call(**options)
                found.append((torch._dynamo.config.get_config_copy(), inductor.get_config_copy()))
                torch._dynamo.config.load_config(before[0])
                inductor.load_config(before[1])
    assert found[:4] == found[4:]
