"""What only a GPU can show: real captures, no waiting, no growth. FLUX blocks of random weights."""

import os
import subprocess
import sys
from pathlib import Path

import first_use
import pytest
import torch
from gpu_checks import (
    check_broken_capture,
    check_guided_loop,
    check_loop,
    check_memory,
    check_memory_of_recordings,
    check_new_shapes,
    check_user_capture,
    check_window,
    prepared_steps,
)
from gpu_loops import FORMS, GUIDED, NEVER_READ, OPTIONS, build, loop
from graph_runs import graphs, same, traces

import dbcache
from dbcache import GraphOptions
from dbcache.graphs.cuda_driver import find_driver

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def modes():
    driver, _ = find_driver() if torch.cuda.is_available() else (None, "")
    return ["host", "device"] if driver is not None else ["host"]


def require(mode):
    if mode not in modes():
        pytest.skip(find_driver()[1])


@pytest.mark.parametrize("mode", ["host", "device"])
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_fifty_steps_are_the_same_bit_for_bit(options, mode):
    require(mode)
    check_loop(options, mode, "cuda")


@pytest.mark.parametrize("mode", ["host", "device"])
@pytest.mark.parametrize("options", GUIDED.values(), ids=GUIDED)
def test_branches_share_a_change_as_eager_ones(options, mode):
    require(mode)
    check_guided_loop(options, mode, "cuda")


@pytest.mark.parametrize("options", NEVER_READ.values(), ids=NEVER_READ)
def test_device_mode_never_waits(options):
    require("device")
    model = build()
    dbcache.enable(model, **options, cuda_graph=GraphOptions(mode="device"))
    loop(model, 6)
    dbcache.refresh_context(model)
    arguments = prepared_steps("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            torch.cuda._sleep(2_000_000_000)  # about a second
            started = torch.cuda.Event()
            started.record()
            for given in arguments:
                model(**given)
            assert not started.query(), "the host must be through while the device still sleeps"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    check_window(model, steps=10)


@pytest.mark.parametrize("mode", ["host", "device"])
def test_memory_does_not_grow(mode):
    require(mode)

    def held():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), -torch.cuda.mem_get_info()[0]

    model = check_memory(mode, "cuda", held, (0, 2**21))
    assert graphs(model)._recorder.nbytes() > 2**20, "the cap goes by what it says"


@pytest.mark.parametrize("mode", ["host", "device"])
def test_memory_does_not_grow_with_recordings_that_are_given_up(mode):
    require(mode)

    def held():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    check_memory_of_recordings(mode, "cuda", held, (0, 2**21))


@pytest.mark.parametrize("mode", ["auto", "host"])
def test_a_capture_that_breaks_leaves_all_of_pytorch_working(mode):
    def draw_and_free():
        torch.randn(4, device="cuda")
        torch.cuda.empty_cache()

    check_broken_capture(mode, modes()[-1], "cuda", draw_and_free)


def test_a_fresh_process_loads_no_kernel_while_it_captures():
    done = subprocess.run(
        [sys.executable, first_use.__file__, modes()[-1]],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *cases, loaded = done.stdout.splitlines()
    assert cases == list(first_use.CASES), "what stands behind a case was loaded too late"
    assert int(loaded) > 5


@pytest.mark.parametrize("mode", ["host", "device"])
def test_a_model_on_another_gpu_than_the_current_one(mode):
    require(mode)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check_loop(OPTIONS, mode, "cuda:1")
    assert torch.cuda.current_device() == 0


def test_compiled_blocks_are_recorded():
    model = build()
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for block in blocks:
            block.compile()
    dbcache.enable(model, **OPTIONS)
    expected = loop(model, 20)
    decided = traces(model)
    check_window(model, least=2, steps=20)
    dbcache.enable(model, **OPTIONS, cuda_graph=modes()[-1])
    got = loop(model, 20)
    assert traces(model) == decided
    assert same(got, expected)
    assert graphs(model).replays == 19


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_the_users_own_capture_of_the_whole_loop(options):
    require("device")

    def capture(whole):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            whole()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            whole()
        return graph

    check_user_capture(options, "cuda", capture)


def test_new_shapes_and_retirement():
    check_new_shapes(modes()[-1], "cuda")
