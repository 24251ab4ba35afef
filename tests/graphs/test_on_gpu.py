"""What only a GPU can show: real captures, no waiting, no growth. FLUX blocks of random weights."""

import os
import subprocess
import sys
from pathlib import Path

import first_use
import inside
import pytest
import torch
from diffusers import FluxTransformer2DModel
from graph_runs import decide_as_recorded, graphs, same

import dbcache
from dbcache import GraphOptions
from dbcache.graphs.cuda_driver import find_driver

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
STEPS = 50
OPTIONS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 4,
    "residual_diff_threshold": 0.12,
    "max_continuous_cached_steps": 4,
    "enable_taylorseer": True,
    "num_inference_steps": STEPS,
}

WITHOUT_PROBE = {name: OPTIONS[name] for name in OPTIONS if name != "Fn_compute_blocks"} | {
    "residual_diff_threshold": 10.0,  # so that the limit of steps in a row decides
}
FOLLOWING = {policy: WITHOUT_PROBE | {"policy": policy} for policy in ("easycache", "seacache")}

TAILED = OPTIONS | {
    "Bn_compute_blocks": 4,
    "Bn_compute_blocks_ids": [1],
    "non_compute_blocks_diff_threshold": 0.08,
}

PRUNED = {
    "cache_type": "DBPrune",
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 4,
    "residual_diff_threshold": 0.12,
    "max_continuous_cached_steps": 4,
    "non_prune_block_ids": [4],
    "num_inference_steps": STEPS,
}

FORMS = {"steps": OPTIONS, "blocks": PRUNED, "last": TAILED, **FOLLOWING}
NEVER_READ = {name: options for name, options in FORMS.items() if name != "seacache"}
"""SeaCache reads the size of the latents once per request."""


def build(device="cuda"):
    torch.manual_seed(0)
    with torch.device(device):
        model = FluxTransformer2DModel(
            in_channels=16, num_layers=3, num_single_layers=6, attention_head_dim=64,
            num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=32,
            axes_dims_rope=(16, 24, 24),
        )  # fmt: skip
    return model.to(torch.bfloat16).eval()


def inputs(x, t):
    like = {"device": x.device, "dtype": torch.bfloat16}
    generator = torch.Generator(x.device).manual_seed(1)
    ids = torch.zeros(256, 3, **like)
    ids[:, 1] = torch.arange(256, device=x.device) // 16
    ids[:, 2] = torch.arange(256, device=x.device) % 16
    return {
        "hidden_states": x,
        "encoder_hidden_states": torch.randn(1, 32, 64, generator=generator, **like),
        "pooled_projections": torch.randn(1, 32, generator=generator, **like),
        "timestep": torch.full((1,), t, **like),
        "img_ids": ids,
        "txt_ids": torch.zeros(32, 3, **like),
        "return_dict": False,
    }


def start(device="cuda"):
    generator = torch.Generator(device).manual_seed(2)
    return torch.randn(1, 256, 16, generator=generator, device=device, dtype=torch.bfloat16)


@torch.no_grad()
def loop(model, steps=STEPS):
    x, outputs = start(model.device), []
    for step in range(steps):
        output = model(**inputs(x, 1 - step / steps))[0]
        outputs.append(output)
        x = x - output * (2 / steps)
    return outputs


def modes():
    driver, _ = find_driver() if torch.cuda.is_available() else (None, "")
    return ["host", "device"] if driver is not None else ["host"]


def require(mode):
    if mode not in modes():
        pytest.skip(find_driver()[1])


def trace(model):
    return inside.stacks(model)[0].lanes[None].steps.trace()


@pytest.mark.parametrize("mode", ["host", "device"])
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_fifty_steps_are_the_same_bit_for_bit(options, mode):
    require(mode)
    model = build()
    dbcache.enable(model, **options)
    decide_as_recorded(model)
    expected, decisions = loop(model), trace(model)
    pruned = dbcache.summary(model).lanes[0].pruned
    assert 5 < sum(reason >= 10 for reason in decisions[0]) < STEPS - 4
    dbcache.enable(model, **options, cuda_graph=mode)
    for _ in range(2):
        got = loop(model)
        assert trace(model) == decisions
        assert dbcache.summary(model).lanes[0].pruned == pruned
        assert same(got, expected)
    assert graphs(model).replays == 2 * STEPS - 1


@torch.no_grad()
def guided_loop(model):
    x, outputs = start(), []
    for step in range(STEPS):
        given = inputs(x, 1 - step / STEPS)
        with model.cache_context("cond"):
            outputs.append(model(**given)[0])
        given["encoder_hidden_states"] = given["encoder_hidden_states"].flip(1)
        with model.cache_context("uncond"):
            outputs.append(model(**given)[0])
        x = x - (1.5 * outputs[-2] - 0.5 * outputs[-1]) * (2 / STEPS)
    return outputs


@pytest.mark.parametrize("mode", ["host", "device"])
@pytest.mark.parametrize(
    "options", [OPTIONS | {"residual_diff_threshold": 0.42}, PRUNED], ids=["steps", "blocks"]
)
def test_branches_share_a_change_as_eager_ones(options, mode):
    require(mode)
    model, options = build(), options | {"cfg_diff_compute_separate": False}
    dbcache.enable(model, **options)
    decide_as_recorded(model)
    (stack,) = inside.stacks(model)
    expected = guided_loop(model)
    decisions = [lane.steps.trace() for lane in stack.lanes.values()]
    assert len(decisions) == 2
    assert all(0 < sum(reason >= 10 for reason in reasons) < STEPS - 4 for reasons, _ in decisions)
    dbcache.enable(model, **options, cuda_graph=mode)
    got = guided_loop(model)
    (stack,) = inside.stacks(model)
    assert [lane.steps.trace() for lane in stack.lanes.values()] == decisions
    assert same(got, expected)
    assert graphs(model).replays == 2 * STEPS - 2


@pytest.mark.parametrize("options", NEVER_READ.values(), ids=NEVER_READ)
def test_device_mode_never_waits(options):
    require("device")
    model = build()
    dbcache.enable(model, **options, cuda_graph=GraphOptions(mode="device"))
    loop(model, 6)
    dbcache.refresh_context(model)
    x = start()
    arguments = [inputs(x, 1 - step / STEPS) for step in range(10)]
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
    assert len(trace(model)[0]) == 10


@pytest.mark.parametrize("mode", ["host", "device"])
def test_memory_does_not_grow(mode):
    require(mode)
    model = build()
    dbcache.enable(model, **OPTIONS, cuda_graph=mode)
    loop(model)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(4):
        loop(model)
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    assert after[0] <= before[0]
    assert after[1] >= before[1] - 2**21
    assert graphs(model)._recorder.nbytes() > 2**20, "the cap goes by what it says"


@pytest.mark.parametrize("mode", ["host", "device"])
def test_memory_does_not_grow_with_recordings_that_are_given_up(mode):
    require(mode)
    model = build()
    dbcache.enable(model, **OPTIONS, cuda_graph=mode)
    held = []
    for _ in range(8):
        loop(model, 6)
        graphs(model).retire()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[-1][0] <= held[2][0]
    assert held[-1][1] <= held[2][1] + 2**21


@pytest.mark.parametrize("mode", ["auto", "host"])
def test_a_capture_that_breaks_leaves_all_of_pytorch_working(mode):
    """Reading a value breaks a capture, which PyTorch by itself does not clean up after."""
    model = build()
    hook = model.transformer_blocks[1].register_forward_hook(
        lambda module, args, output: (
            output[0] * (2 if output[0].abs().max().item() < 0 else 1),
            output[1],
        )
    )
    dbcache.enable(model, **OPTIONS)
    expected = loop(model, 8)
    dbcache.enable(model, **OPTIONS, cuda_graph=mode)
    if mode == "auto":
        with pytest.warns(UserWarning, match="runs eagerly"):
            got = loop(model, 8)
        assert same(got, expected)
    else:
        with pytest.raises(RuntimeError, match="is impossible here"):
            loop(model, 8)
    assert not graphs(model).recordings
    torch.randn(4, device="cuda")
    torch.cuda.empty_cache()
    hook.remove()
    dbcache.enable(model, **OPTIONS, cuda_graph=modes()[-1])
    again = loop(model, 8)
    assert same(again, expected)
    assert graphs(model).replays == 7


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
    model = build("cuda:1")
    dbcache.enable(model, **OPTIONS)
    expected, decisions = loop(model), trace(model)
    dbcache.enable(model, **OPTIONS, cuda_graph=mode)
    got = loop(model)
    assert trace(model) == decisions
    assert same(got, expected)
    assert torch.cuda.current_device() == 0


def test_compiled_blocks_are_recorded():
    model = build()
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for block in blocks:
            block.compile()
    dbcache.enable(model, **OPTIONS)
    expected, decisions = loop(model, 20), trace(model)
    dbcache.enable(model, **OPTIONS, cuda_graph=modes()[-1])
    got = loop(model, 20)
    assert trace(model) == decisions
    assert same(got, expected)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_the_users_own_capture_of_the_whole_loop(options):
    require("device")
    model = build()
    dbcache.enable(model, **options)
    decide_as_recorded(model)
    expected, decisions = loop(model)[-1], trace(model)
    x = start()
    arguments = [inputs(x, 1 - step / STEPS) for step in range(STEPS)]
    last = torch.empty_like(expected)

    @torch.no_grad()
    def whole():
        dbcache.refresh_context(model)
        for given in arguments:
            output = model(**given)[0]
            x.sub_(output * (2 / STEPS))
        last.copy_(output)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        whole()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()
    for _ in range(2):
        x.copy_(start())
        last.fill_(float("nan"))
        graph.replay()
        assert torch.equal(last, expected)
        assert trace(model) == decisions


def test_new_shapes_and_retirement():
    model = build()
    options = GraphOptions(mode=modes()[-1], max_recordings=1)
    dbcache.enable(model, **OPTIONS, cuda_graph=options)
    first = loop(model, 8)
    with torch.no_grad():
        dbcache.refresh_context(model)
        for _ in range(4):
            big = inputs(start().repeat(2, 1, 1), 0.5)
            for name in ("encoder_hidden_states", "pooled_projections", "timestep"):
                big[name] = big[name].repeat(2, *[1] * (big[name].dim() - 1))
            model(**big)
    assert graphs(model).retired == 1
    dbcache.refresh_context(model)
    again = loop(model, 8)
    assert same(first, again)
