"""A transformer inside a capture that the user began: one step, or the whole loop."""

import inside
import pytest
from fake_driver import FakeDriver
from graph_runs import FLUX, Loop, agree, conditional_nodes, decide_as_recorded, graphs, two_stacks
from tape import use_driver

import dbcache

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.parametrize("version", [12060, 13000])
def test_the_whole_loop_is_one_graph_that_decides_inside(capture, version):
    model, fake = FLUX.build(), FakeDriver(version)
    dbcache.enable(model, **OPTIONS)
    loop = Loop(model, STEPS)
    expected = {seed: loop.run(seed) for seed in (1, 2, 3)}
    assert len({str(reasons) for _, ((_, _, reasons, *_),) in expected.values()}) > 1
    graph = capture(fake, loop.whole)
    nodes_per_step = 1 if version >= 12080 else 2
    assert conditional_nodes(graph.graph) == nodes_per_step * (STEPS - OPTIONS["max_warmup_steps"])
    for seed, run in expected.items():
        assert agree(loop.replay(graph, seed), run)


def test_one_captured_step_serves_all_steps(capture):
    model = FLUX.build()
    dbcache.enable(model, **OPTIONS)
    loop = Loop(model, STEPS)
    expected = loop.run(1)
    dbcache.refresh_context(model)
    graph = capture(FakeDriver(), loop.one)
    assert agree(loop.replay_steps(graph, 1), expected)


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


@pytest.mark.parametrize("version", [12060, 13000])
def test_a_loop_that_leaves_out_blocks_is_one_graph(capture, version):
    model, fake = FLUX.build(), FakeDriver(version)
    dbcache.enable(model, PRUNED)
    decide_as_recorded(model)
    loop = Loop(model, STEPS)
    expected = {seed: loop.run(seed) for seed in (1, 2)}
    graph = capture(fake, loop.whole)
    nodes_per_block = 1 if version >= 12080 else 2
    prunable = sum(inside.stacks(model)[0].prunable)
    assert prunable == 8
    assert conditional_nodes(graph.graph) == nodes_per_block * prunable * (STEPS - 6)
    for seed, run in expected.items():
        assert agree(loop.replay(graph, seed), run)
        ((*_, left_out),) = run[1]
        assert any(left_out)


def test_one_captured_step_that_leaves_out_blocks_serves_all_steps(capture):
    model = FLUX.build()
    dbcache.enable(model, PRUNED)
    decide_as_recorded(model)
    loop = Loop(model, STEPS)
    expected = loop.run(1)
    dbcache.refresh_context(model)
    graph = capture(FakeDriver(), loop.one)
    assert agree(loop.replay_steps(graph, 1), expected)


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
    model, fake = FLUX.build(), FakeDriver(version)
    calls = calls_of_last_blocks(model)
    dbcache.enable(model, **TAILED)
    loop = Loop(model, STEPS)
    expected = {seed: loop.run(seed) for seed in (1, 2)}
    ran = [calls.count(i) for i in range(4)]
    below = sum(reasons.count("below threshold") for _, ((_, _, reasons, *_),) in expected.values())
    assert ran[1] == 2 * STEPS
    assert all(2 * STEPS - below < ran[i] < 2 * STEPS for i in (0, 2, 3)), "some of both"
    graph = capture(fake, loop.whole)
    nodes_per_branch = 1 if version >= 12080 else 2
    assert conditional_nodes(graph.graph) == nodes_per_branch * (1 + 3) * (STEPS - 4)
    for seed, run in expected.items():
        assert agree(loop.replay(graph, seed), run)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_one_captured_step_that_leaves_out_last_blocks_serves_all_steps(capture, steps_before):
    model = FLUX.build()
    dbcache.enable(model, **TAILED)
    flags, loop = [], Loop(model, STEPS)

    def note(*_):
        flags.append(inside.stacks(model)[0].lanes[None].tail.flags.tolist())

    handle = model.register_forward_hook(note)
    expected = loop.run(1)
    handle.remove()
    decided = list(flags)
    assert {0, 1, 3} & {sum(step) for step in decided} >= {0, 3}
    dbcache.refresh_context(model)
    for _ in range(steps_before):
        loop.one()
        dbcache.refresh_context(model)
    graph = capture(FakeDriver(), loop.one)
    flags.clear()
    assert agree(loop.replay_steps(graph, 1, note), expected)
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
    loop = Loop(model, STEPS)
    expected = loop.run(1)
    assert sum(mask) < calls.count(0) < STEPS
    graph = capture(fake, loop.whole)
    assert conditional_nodes(graph.graph) == 3 * mask.count(0)
    assert agree(loop.replay(graph, 1), expected)


def test_without_conditional_nodes_the_error_says_what_to_do(capture):
    model, fake = FLUX.build(), FakeDriver(12040)
    dbcache.enable(model, **OPTIONS)
    loop = Loop(model, STEPS)
    expected = loop.run(1)
    with pytest.raises(RuntimeError, match=r"12040.*steps_computation_policy='static'"):
        capture(fake, loop.whole)
    # the model works on
    assert agree(loop.run(1), expected)


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
    loop = Loop(model, STEPS)
    expected = loop.run(1)
    graph = capture(fake, loop.whole)
    assert {n.kind.name for n in graph.graph.nodes} == {"CU_GRAPH_NODE_TYPE_KERNEL"}
    assert agree(loop.replay(graph, 1), expected)


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
    loop = Loop(model, STEPS)
    expected = loop.run(1)
    ((_, _, reasons, *_),) = expected[1]
    assert {"mask", "below threshold"} <= set(reasons)
    graph = capture(fake, loop.whole)
    assert conditional_nodes(graph.graph) == mask.count(0)
    assert agree(loop.replay(graph, 1), expected)


def test_a_failure_in_the_middle_of_a_body_leaves_nothing_captured(capture):
    model, fake = FLUX.build(), FakeDriver()
    dbcache.enable(model, **OPTIONS)
    loop = Loop(model, STEPS)
    expected = loop.run(1)
    block, fails = model.transformer_blocks[2], [False]
    run = block.forward

    def forward(*args, **kwargs):
        if fails[0] and len(fake.captures) == 2:  # the user's, and that of a body
            raise RuntimeError("out of memory")
        return run(*args, **kwargs)

    block.forward = forward
    fails[0] = True
    with pytest.raises(RuntimeError, match="out of memory"):
        capture(fake, loop.whole)
    assert not fake.captures
    fails[0] = False
    graph = capture(fake, loop.whole)
    assert agree(loop.replay(graph, 1), expected)


@pytest.mark.parametrize("config", [OPTIONS, {"cache_config": PRUNED}], ids=["steps", "blocks"])
def test_a_capture_before_the_first_step_is_refused(capture, config):
    model, fake = FLUX.build(), FakeDriver()
    dbcache.enable(model, **config)
    loop = Loop(model, STEPS)
    with pytest.raises(
        RuntimeError, match=r"a step must have run before one is captured.*run one first"
    ):
        capture(fake, loop.whole)
    loop.one()
    capture(fake, loop.whole)


@pytest.mark.parametrize("scope", ["stack", "model"])
def test_a_loop_over_two_stacks_has_two_branches_per_step(capture, scope):
    model, fake = FLUX.build(), FakeDriver()
    dbcache.enable(two_stacks(model), **OPTIONS, decision_scope=scope)
    loop = Loop(model, STEPS)
    expected = {seed: loop.run(seed) for seed in (1, 2)}
    graph = capture(fake, loop.whole)
    assert conditional_nodes(graph.graph) == 2 * (STEPS - OPTIONS["max_warmup_steps"])
    for seed, run in expected.items():
        assert agree(loop.replay(graph, seed), run)
        assert any("below threshold" in reasons for _, _, reasons, *_ in run[1])


def test_recordings_of_the_transformers_own_keep_out_of_a_users_capture(capture, monkeypatch):
    model, fake = FLUX.build(), FakeDriver()
    use_driver(monkeypatch, fake)
    dbcache.enable(model, **OPTIONS, cuda_graph="device")
    loop = Loop(model, STEPS)
    _, expected = loop.run(2), loop.run(1)
    replays, launches = graphs(model).replays, fake.launches
    assert replays > STEPS
    graph = capture(fake, loop.whole)
    assert (graphs(model).replays, fake.launches) == (replays, launches)
    assert agree(loop.replay(graph, 1), expected)


@pytest.mark.parametrize("records", [False, "device"])
def test_a_captured_loop_goes_by_numbers_that_change_later(capture, monkeypatch, records):
    model, other, fake = FLUX.build(), FLUX.build(), FakeDriver()
    use_driver(monkeypatch, fake)
    dbcache.enable(model, **OPTIONS, cuda_graph=records)
    loop = Loop(model, STEPS)
    _, before = loop.run(1)
    graph = capture(fake, loop.whole)
    bodies = inside.handle(model).setup.capture
    changes = {"max_continuous_cached_steps": 1}
    dbcache.refresh_context(model, **changes)
    assert inside.handle(model).setup.capture is bodies is not None, "the memory of the graph stays"
    dbcache.enable(other, **OPTIONS | changes)
    expected = Loop(other, STEPS).run(1)
    assert agree(loop.replay(graph, 1), expected)
    assert [lane[2] for lane in expected[1]] != [lane[2] for lane in before]
