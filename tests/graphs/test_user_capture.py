"""A transformer inside a capture that the user began: one step, or the whole loop."""

import pytest
import torch
from fake_driver import FakeDriver
from tape import TapeUserCapture, use_driver
from tiny import FAMILIES, noise

import dbcache
from dbcache import BlockAdapter, ForwardPattern
from dbcache.adapters.cached_transformer import handle_of
from dbcache.executors import cuda_capture

pytestmark = pytest.mark.usefixtures("one_thread")

FLUX = FAMILIES["flux"]
STEPS = 20
OPTIONS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 4,
    "residual_diff_threshold": 0.15,
    "taylorseer_order": 1,
    "enable_taylorseer": True,
    "max_continuous_cached_steps": 3,
    "num_inference_steps": STEPS,
}


def start(seed):
    return noise(*FLUX.latent_shape, seed=seed)


INPUTS = [FLUX.arguments(start(0), 1.0 - step / STEPS, "cond") for step in range(STEPS)]


@torch.no_grad()
def loop(model, x):
    """Denoise `x` in place."""
    for inputs in INPUTS:
        x -= model(**inputs | {"hidden_states": x})[0] / STEPS


@pytest.mark.parametrize("version", [12060, 13000])
def test_the_whole_loop_is_one_graph_that_decides_inside(capture, version):
    model, fake = FLUX.build(), FakeDriver(version)
    dbcache.enable(model, **OPTIONS)
    expected = []
    for seed in (1, 2, 3):
        x = start(seed)
        loop(model, x)
        expected.append((x, dbcache.summary(model).lanes[0].reasons))
    assert expected[0][1] != expected[1][1] or expected[1][1] != expected[2][1]

    x = start(1)

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    graph = capture(fake, whole)
    conditional = [n for n in graph.graph.nodes if n.kind.name.endswith("CONDITIONAL")]
    nodes_per_step = 1 if version >= 12080 else 2
    assert len(conditional) == nodes_per_step * (STEPS - OPTIONS["max_warmup_steps"])
    for seed, (latents, reasons) in zip((1, 2, 3), expected, strict=True):
        x.copy_(start(seed))
        graph.replay()
        assert torch.equal(x, latents)
        assert dbcache.summary(model).lanes[0].reasons == reasons


def test_one_captured_step_serves_all_steps(capture):
    model, fake = FLUX.build(), FakeDriver()
    dbcache.enable(model, **OPTIONS)
    expected = start(1)
    loop(model, expected)
    reasons = dbcache.summary(model).lanes[0].reasons

    x, t = start(1), torch.ones(1)
    arguments = FLUX.arguments(x, 1.0, "cond") | {"timestep": t}
    dbcache.refresh_context(model)
    with torch.no_grad():
        model(**arguments)  # a step before the capture, which makes the buffers
        dbcache.refresh_context(model)

        def one():
            x.sub_(model(**arguments)[0] / STEPS)

        graph = capture(fake, one)
    dbcache.refresh_context(model)
    x.copy_(start(1))
    for step in range(STEPS):
        t.fill_(1.0 - step / STEPS)
        graph.replay()
    assert torch.equal(x, expected)
    assert dbcache.summary(model).lanes[0].reasons == reasons


PRUNED = dbcache.DBPruneConfig(
    Fn_compute_blocks=1,
    max_warmup_steps=4,
    steps_computation_mask=[1] * 6 + [0] * (STEPS - 6),
    residual_diff_threshold=0.1,
    max_continuous_cached_steps=3,
    residual_cache_update_interval=2,
    non_prune_block_ids=[3],
    num_inference_steps=STEPS,
)


def blocks_left_out(model):
    (lane,) = dbcache.summary(model).lanes
    return lane.reasons, lane.pruned


@pytest.mark.parametrize("version", [12060, 13000])
def test_a_loop_that_leaves_out_blocks_is_one_graph(capture, version):
    model, fake, expected = FLUX.build(), FakeDriver(version), []
    dbcache.enable(model, PRUNED)
    (stack,) = handle_of(model).stacks
    stack.prepare_recording()  # each block that is left out adds its own residual
    for seed in (1, 2):
        x = start(seed)
        loop(model, x)
        expected.append((x, *blocks_left_out(model)))

    x = start(3)

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    graph = capture(fake, whole)
    conditional = [n for n in graph.graph.nodes if n.kind.name.endswith("CONDITIONAL")]
    nodes_per_block = 1 if version >= 12080 else 2
    prunable = sum(stack.run.prunable)
    assert prunable == 8
    assert len(conditional) == nodes_per_block * prunable * (STEPS - 6)
    for seed, (latents, *decisions) in zip((1, 2), expected, strict=True):
        x.copy_(start(seed))
        graph.replay()
        assert torch.equal(x, latents)
        assert list(blocks_left_out(model)) == decisions
        assert any(decisions[1])


def test_one_captured_step_that_leaves_out_blocks_serves_all_steps(capture):
    model, fake = FLUX.build(), FakeDriver()
    dbcache.enable(model, PRUNED)
    handle_of(model).stacks[0].prepare_recording()
    expected = start(1)
    loop(model, expected)
    decisions = blocks_left_out(model)

    x, t = start(1), torch.ones(1)
    arguments = FLUX.arguments(x, 1.0, "cond") | {"timestep": t}
    dbcache.refresh_context(model)

    def one():
        x.sub_(model(**arguments)[0] / STEPS)

    with torch.no_grad():
        graph = capture(fake, one)
    dbcache.refresh_context(model)
    x.copy_(start(1))
    for step in range(STEPS):
        t.fill_(1.0 - step / STEPS)
        graph.replay()
    assert torch.equal(x, expected)
    assert blocks_left_out(model) == decisions


TAILED = OPTIONS | {
    "Bn_compute_blocks": 4,
    "Bn_compute_blocks_ids": [1],
    "non_compute_blocks_diff_threshold": 0.09,
    "max_continuous_cached_steps": 4,
}


def calls_of_last_blocks(model):
    """Return a list that grows by the number of each of the last four blocks as it runs."""
    calls = []
    for i, block in enumerate(model.single_transformer_blocks[-4:]):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    return calls


@pytest.mark.parametrize("version", [12060, 13000])
def test_a_loop_that_leaves_out_last_blocks_is_one_graph(capture, version):
    model, fake, expected = FLUX.build(), FakeDriver(version), []
    calls = calls_of_last_blocks(model)
    dbcache.enable(model, **TAILED)
    for seed in (1, 2):
        x = start(seed)
        loop(model, x)
        expected.append((x, dbcache.summary(model).lanes[0].reasons))
    ran = [calls.count(i) for i in range(4)]
    below = sum(reasons.count("below threshold") for _, reasons in expected)
    assert ran[1] == 2 * STEPS
    assert all(2 * STEPS - below < ran[i] < 2 * STEPS for i in (0, 2, 3)), "some of both"

    x = start(3)

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    graph = capture(fake, whole)
    conditional = [n for n in graph.graph.nodes if n.kind.name.endswith("CONDITIONAL")]
    nodes_per_branch = 1 if version >= 12080 else 2
    assert len(conditional) == nodes_per_branch * (1 + 3) * (STEPS - 4)
    for seed, (latents, reasons) in zip((1, 2), expected, strict=True):
        x.copy_(start(seed))
        graph.replay()
        assert torch.equal(x, latents)
        assert dbcache.summary(model).lanes[0].reasons == reasons


@pytest.mark.parametrize("steps_before", [0, 1])
def test_one_captured_step_that_leaves_out_last_blocks_serves_all_steps(capture, steps_before):
    model, fake = FLUX.build(), FakeDriver()
    dbcache.enable(model, **TAILED)
    flags, expected = [], start(1)

    def note(*_):
        flags.append(handle_of(model).stacks[0].lanes[None].tail.flags.tolist())

    handle = model.register_forward_hook(note)
    loop(model, expected)
    handle.remove()
    decided = list(flags)
    assert {0, 1, 3} & {sum(step) for step in decided} >= {0, 3}
    reasons = dbcache.summary(model).lanes[0].reasons

    x, t = start(1), torch.ones(1)
    arguments = FLUX.arguments(x, 1.0, "cond") | {"timestep": t}
    dbcache.refresh_context(model)
    with torch.no_grad():
        for _ in range(steps_before):
            model(**arguments)
            dbcache.refresh_context(model)

        def one():
            x.sub_(model(**arguments)[0] / STEPS)

        graph = capture(fake, one)
    flags.clear()
    dbcache.refresh_context(model)
    x.copy_(start(1))
    for step in range(STEPS):
        t.fill_(1.0 - step / STEPS)
        graph.replay()
        note()
    assert torch.equal(x, expected)
    assert dbcache.summary(model).lanes[0].reasons == reasons
    assert flags == decided


def test_a_static_plan_has_branches_for_last_blocks_alone(capture):
    model, fake = FLUX.build(), FakeDriver()
    mask = [1, 1, 1, 0, 0, 1, 0, 0, 0, 1] * 2
    calls = calls_of_last_blocks(model)
    dbcache.enable(
        model,
        **TAILED | {"non_compute_blocks_diff_threshold": 0.05},
        steps_computation_mask=mask,
        steps_computation_policy="static",
    )
    expected = start(1)
    loop(model, expected)
    assert sum(mask) < calls.count(0) < STEPS
    x = start(2)

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    graph = capture(fake, whole)
    conditional = [n for n in graph.graph.nodes if n.kind.name.endswith("CONDITIONAL")]
    assert len(conditional) == 3 * mask.count(0)
    x.copy_(start(1))
    graph.replay()
    assert torch.equal(x, expected)


def test_without_conditional_nodes_the_error_says_what_to_do(capture, monkeypatch):
    model, fake = FLUX.build(), FakeDriver()
    dbcache.enable(model, **OPTIONS)
    x = start(1)
    loop(model, x)
    why = "the driver must support CUDA 12.6 or later, got 12040"
    monkeypatch.setattr(TapeUserCapture, "__init__", with_reason(why))

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    with pytest.raises(RuntimeError, match=r"12040.*steps_computation_policy='static'"):
        capture(fake, whole)
    # the model works on
    dbcache.refresh_context(model)
    x, y = start(1), start(1)
    loop(model, x)
    dbcache.disable(model)
    dbcache.enable(model, **OPTIONS)
    loop(model, y)
    assert torch.equal(x, y)


def with_reason(why):
    def init(self, device, driver, _):
        cuda_capture.UserCapture.__init__(self, device, None, why)

    return init


def test_a_static_plan_needs_no_branch(capture, monkeypatch):
    model, fake = FLUX.build(), FakeDriver(12040)
    mask = [1, 1, 1, 0, 0, 1, 0, 0, 0, 1] * 2
    dbcache.enable(
        model,
        Fn_compute_blocks=1,
        max_warmup_steps=1,
        steps_computation_mask=mask,
        steps_computation_policy="static",
        num_inference_steps=STEPS,
    )
    expected = start(1)
    loop(model, expected)
    x = start(2)

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    graph = capture(fake, whole)
    assert {n.kind.name for n in graph.graph.nodes} == {"CU_GRAPH_NODE_TYPE_KERNEL"}
    x.copy_(start(1))
    graph.replay()
    assert torch.equal(x, expected)


def test_steps_that_the_plan_fixes_have_no_branch_wherever_they_are(capture):
    model, fake = FLUX.build(), FakeDriver()
    mask = [1, 1, 1, 0, 0, 1, 0, 0, 0, 1] * 2
    dbcache.enable(
        model,
        Fn_compute_blocks=1,
        max_warmup_steps=1,
        steps_computation_mask=mask,
        residual_diff_threshold=0.15,
        num_inference_steps=STEPS,
    )
    expected = start(1)
    loop(model, expected)
    reasons = dbcache.summary(model).lanes[0].reasons
    assert {"mask", "below threshold"} <= set(reasons)
    x = start(2)

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    graph = capture(fake, whole)
    conditional = [n for n in graph.graph.nodes if n.kind.name.endswith("CONDITIONAL")]
    assert len(conditional) == mask.count(0)
    x.copy_(start(1))
    graph.replay()
    assert torch.equal(x, expected)
    assert dbcache.summary(model).lanes[0].reasons == reasons


def test_a_failure_in_the_middle_of_a_body_leaves_nothing_captured(capture):
    model, fake = FLUX.build(), FakeDriver()
    dbcache.enable(model, **OPTIONS)
    x, expected = start(1), start(1)
    loop(model, expected)
    block, fails = model.transformer_blocks[2], [False]
    run = block.forward

    def forward(*args, **kwargs):
        if fails[0] and len(fake.captures) == 2:  # the user's, and that of a body
            raise RuntimeError("out of memory")
        return run(*args, **kwargs)

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    block.forward = forward
    fails[0] = True
    with pytest.raises(RuntimeError, match="out of memory"):
        capture(fake, whole)
    assert not fake.captures
    fails[0] = False
    graph = capture(fake, whole)
    x.copy_(start(1))
    graph.replay()
    assert torch.equal(x, expected)


@pytest.mark.parametrize("config", [OPTIONS, {"cache_config": PRUNED}], ids=["steps", "blocks"])
def test_a_capture_before_the_first_step_is_refused(capture, config):
    model, fake = FLUX.build(), FakeDriver()
    dbcache.enable(model, **config)
    x = start(1)

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    with pytest.raises(
        RuntimeError, match=r"a step must have run before one is captured.*run one first"
    ):
        capture(fake, whole)
    with torch.no_grad():
        model(**INPUTS[0])
    capture(fake, whole)


@pytest.mark.parametrize("scope", ["stack", "model"])
def test_a_loop_over_two_stacks_has_two_branches_per_step(capture, scope):
    model, fake, expected = FLUX.build(), FakeDriver(), []
    adapter = BlockAdapter(
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_1],
    )
    dbcache.enable(adapter, **OPTIONS, decision_scope=scope)
    for seed in (1, 2):
        x = start(seed)
        loop(model, x)
        expected.append((x, [lane.reasons for lane in dbcache.summary(adapter).lanes]))
    x = start(3)

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    graph = capture(fake, whole)
    conditional = [n for n in graph.graph.nodes if n.kind.name.endswith("CONDITIONAL")]
    assert len(conditional) == 2 * (STEPS - OPTIONS["max_warmup_steps"])
    for seed, (latents, reasons) in zip((1, 2), expected, strict=True):
        x.copy_(start(seed))
        graph.replay()
        assert torch.equal(x, latents)
        assert [lane.reasons for lane in dbcache.summary(adapter).lanes] == reasons
        assert any("below threshold" in steps for steps in reasons)


def test_recordings_of_the_transformers_own_keep_out_of_a_users_capture(capture, monkeypatch):
    model, fake = FLUX.build(), FakeDriver()
    use_driver(monkeypatch, fake)
    dbcache.enable(model, **OPTIONS, cuda_graph="device")
    x, expected = start(2), start(1)
    for latents in (x, expected):
        dbcache.refresh_context(model)
        loop(model, latents)
    executor = handle_of(model).graphs
    replays, launches = executor.replays, fake.launches
    assert replays > STEPS

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    graph = capture(fake, whole)
    assert (executor.replays, fake.launches) == (replays, launches)
    x.copy_(start(1))
    graph.replay()
    assert torch.equal(x, expected)


@pytest.mark.parametrize("records", [False, "device"])
def test_a_captured_loop_goes_by_numbers_that_change_later(capture, monkeypatch, records):
    model, other, fake = FLUX.build(), FLUX.build(), FakeDriver()
    use_driver(monkeypatch, fake)
    dbcache.enable(model, **OPTIONS, cuda_graph=records)
    x = start(1)
    loop(model, x)

    def whole():
        dbcache.refresh_context(model)
        loop(model, x)

    before = dbcache.summary(model).lanes[0].reasons
    graph = capture(fake, whole)
    bodies = handle_of(model)._capture
    changes = {"max_continuous_cached_steps": 1}
    dbcache.refresh_context(model, **changes)
    assert handle_of(model)._capture is bodies is not None, "the memory of the graph stays"
    x.copy_(start(1))
    graph.replay()
    dbcache.enable(other, **OPTIONS | changes)
    expected = start(1)
    loop(other, expected)
    assert torch.equal(x, expected)
    reasons = dbcache.summary(other).lanes[0].reasons
    assert dbcache.summary(model).lanes[0].reasons == reasons
    assert reasons != before
