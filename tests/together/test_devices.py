"""The cache beside compile, offload, moves and quantised weights, on a GPU, and rehearsed on a CPU.

On a GPU blocks are compiled by Inductor, offload moves weights on a stream of its own, and weights
are in float8.
"""

import pytest
import torch
from gpu_checks import check_window
from gpu_loops import OPTIONS, build, loop
from graph_runs import same, traces

import dbcache

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = 14
OFF = OPTIONS | {"residual_diff_threshold": 0.0}
CPU = torch.device("cpu")


def by_block(model, device):
    model.enable_group_offload(
        torch.device(device), CPU, offload_type="block_level", num_blocks_per_group=1,
        use_stream=device == "cuda",
    )  # fmt: skip


def by_leaf(model, device):
    model.enable_group_offload(
        torch.device(device), CPU, offload_type="leaf_level", use_stream=device == "cuda"
    )


def sequential(model, device):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, torch.device(device))


def run(model, options, steps=STEPS):
    dbcache.enable(model, **options | {"num_inference_steps": steps})
    return loop(model, steps), traces(model)


def check_cached(model):
    """See to it that threshold 0 changes no bit, and that another one caches."""
    plain = loop(model, STEPS)
    outputs, _ = run(model, OFF)
    assert same(outputs, plain)
    run(model, OPTIONS)
    check_window(model, least=2, steps=STEPS)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [by_block, by_leaf, sequential])
@pytest.mark.parametrize("device", DEVICES)
def test_offloaded_models_are_cached_as_others(device, offload, when):
    outputs, decided = run(build(device), OPTIONS)
    model = build("cpu")
    if when == "before":
        offload(model, device)
    dbcache.enable(model, **OPTIONS | {"num_inference_steps": STEPS})
    if when == "after":
        offload(model, device)
    for _ in range(2):
        assert same(loop(model, STEPS, device), outputs)
        assert traces(model) == decided
    check_window(model, least=2, steps=STEPS)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_moves_after_enable_is_cached_there(device):
    outputs, decided = run(build(device), OPTIONS)
    model = build("cpu")
    run(model, OPTIONS)
    model.to(device)
    assert same(loop(model, STEPS), outputs)
    assert traces(model) == decided


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_blocks_run_on_full_steps(device):
    backend = "inductor" if device == "cuda" else "eager"
    model = build(device)
    dbcache.compile(model, backend=backend)
    check_cached(model)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    loop(model, STEPS)
    check_window(model, least=2, steps=STEPS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled > 0


@pytest.mark.parametrize("device", DEVICES)
def test_quantised_weights_are_cached(device):
    pytest.importorskip("torchao")
    kind = "float8_weight_only" if device == "cuda" else "int8_weight_only"
    model = build(device)
    dbcache.quantize(model, quant_type=kind)
    check_cached(model)
