"""What cannot be recorded, as the libraries make it; and compiled blocks, which can."""

import re

import pytest
import torch
from fake_driver import NODE
from graph_runs import FLUX, MODES, OPTIONS, graphs, recordings, same
from tape import TapeRecorder
from tiny import denoise
from torch.utils._python_dispatch import TorchDispatchMode

import dbcache
from dbcache.graphs.fingerprint import reason_against

pytestmark = pytest.mark.usefixtures("one_thread")


def cast_layerwise(model):
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(
        model.transformer_blocks, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def offload_groups(model):
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


def offload_model(model):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, torch.device("cpu"))


def offload_submodules(model):
    from accelerate import cpu_offload

    cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("move", "reason"),
    [
        (cast_layerwise, r"\(.*\) has the hook LayerwiseCastingHook"),
        (offload_groups, r"has the hook GroupOffloadingHook"),
        (offload_model, r"the transformer .*has the hook CpuOffload"),
        (offload_submodules, r"must lie on one GPU, got cpu, meta"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_weights_that_the_libraries_move_are_refused(driver, move, reason):
    model = FLUX.build()
    move(model)
    dbcache.enable(model, **OPTIONS, cuda_graph=True)
    with pytest.warns(UserWarning, match=f"runs eagerly: .*{reason}"):
        got = denoise(model, FLUX, 8)
    assert not recordings(model)
    notes = " ".join(dbcache.summary(model).notes)
    assert re.search(r"\((7|8) times\)", notes), "all of them, but perhaps the first of its kind"
    dbcache.enable(model, **OPTIONS)
    assert same(got, denoise(model, FLUX, 8))


def test_nothing_is_said_against_a_plain_model_and_much_against_one_that_is_not_all_there():
    model = FLUX.build()
    assert reason_against(model) is None
    model.proj_out.to("meta")
    assert reason_against(model) == (
        "its weights must lie on the device, some are offloaded (meta)"
    )


@pytest.mark.parametrize("body", [1, 2])
def test_either_body_with_other_nodes_is_refused_and_its_graph_freed(driver, monkeypatch, body):
    """Segments are recorded in the order pre, full body, cached body, rest."""
    end, count = TapeRecorder.end, [0]

    def taint(recorder):
        tape = end(recorder)
        if count[0] == body:
            driver.graphs[tape.raw].nodes[0].kind = NODE["WAIT_EVENT"]
        count[0] += 1
        return tape

    monkeypatch.setattr(TapeRecorder, "end", taint)
    model = dbcache.enable(FLUX.build(), **OPTIONS, cuda_graph=True)
    with pytest.warns(UserWarning, match="goes on with 'host': .*got WAIT_EVENT nodes"):
        denoise(model, FLUX, 4)
    assert len(driver.destroyed) == 1
    (recording,) = recordings(model)
    assert recording.replay.mode == "host"


@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_are_compiled_one_by_one_are_recorded(driver, mode):
    """Regional compilation; the backend only tells that the compiled code is what was recorded."""
    seen = []

    def backend(graph, _):
        def run(*inputs):
            seen.append(torch._C._len_torch_dispatch_stack() > 0)
            return graph(*inputs)

        return run

    torch._dynamo.reset()
    model = FLUX.build()
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for block in blocks:
            block.compile(backend=backend)
    dbcache.enable(model, **OPTIONS)
    expected, eager = denoise(model, FLUX, 10), dbcache.summary(model).lanes[0]
    dbcache.enable(model, **OPTIONS, cuda_graph=mode)
    got, recorded = denoise(model, FLUX, 10), dbcache.summary(model).lanes[0]
    torch._dynamo.reset()
    assert same(got, expected)
    assert recorded.reasons == eager.reasons
    assert eager.cached_steps
    if hasattr(TorchDispatchMode, "ignore_compile_internals"):  # else they are recorded uncompiled
        assert sum(seen) == len(model.transformer_blocks) + len(model.single_transformer_blocks)
    assert graphs(model).replays == 9


def test_a_version_of_the_bindings_that_is_called_otherwise_is_stepped_down_from(
    driver, monkeypatch
):
    def takes_more(self, graph, params, one_more):
        raise AssertionError

    monkeypatch.setattr(type(driver), "do_cuGraphInstantiateWithParams", takes_more)
    model = dbcache.enable(FLUX.build(), **OPTIONS, cuda_graph=True)
    with pytest.warns(UserWarning, match="goes on with 'host': cuGraphInstantiate.*one_more"):
        denoise(model, FLUX, 4)
    monkeypatch.delattr(type(driver), "do_cuGraphCreate")
    dbcache.enable(model, **OPTIONS, cuda_graph="device")
    with pytest.raises(RuntimeError, match=r"cuGraphCreate must be .*bindings.*version 13\.0"):
        denoise(model, FLUX, 4)


def test_a_capture_that_is_found_broken_at_its_end_is_left_off(driver, monkeypatch):
    end, abort, calls = TapeRecorder.end, TapeRecorder.abort, []

    def breaks(recorder):
        calls.append("end")
        if calls.count("end") % 4 == 0:  # of the last segment
            raise RuntimeError("operation failed due to a previous error during capture")
        return end(recorder)

    monkeypatch.setattr(TapeRecorder, "end", breaks)
    monkeypatch.setattr(TapeRecorder, "abort", lambda self: calls.append("abort") or abort(self))
    # would hand the stream of a broken capture on
    monkeypatch.setattr(TapeRecorder, "close", lambda self: calls.append("close"))
    model = dbcache.enable(FLUX.build(), **OPTIONS, cuda_graph=True)
    with pytest.warns(UserWarning, match="runs eagerly: .*previous error during capture"):
        got = denoise(model, FLUX, 8)
    assert calls == [*["end"] * 4, "abort"] * 2
    dbcache.enable(model, **OPTIONS)
    assert same(got, denoise(model, FLUX, 8))
