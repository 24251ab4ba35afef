"""Branches that take over each other's change, recorded, against eager steps: the same bits.

Eagerly the host knows who has measured and the others do not measure; recorded, all of them measure
and the device decides what counts.
"""

import pipelines
import pytest
import torch
from fake_driver import FakeDriver
from tiny import FAMILIES, noise

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig
from dbcache.adapters.cached_transformer import handle_of

pytestmark = pytest.mark.usefixtures("one_thread")

QWEN = FAMILIES["qwen"]
STEPS = 30
CAPTURED = 10
MODES = ("host", "device")
BOTH = ("cond", "uncond")
METHODS = {
    "cache": DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.12),
    "cache limits": DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=7,
        warmup_interval=3,
        residual_diff_threshold=0.2,
        max_continuous_cached_steps=2,
        max_cached_steps=12,
        batch_reduce="max",
    ),
    "cache mask": DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=1,
        steps_computation_mask=[1, 0, 0, 1, 0, 0] * 5,
        residual_diff_threshold=0.12,
        important_condition_threshold=0.05,
    ),
    "prune": DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.1),
    "prune limits": DBPruneConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=3,
        residual_diff_threshold=0.12,
        max_continuous_cached_steps=2,
        max_pruned_steps=12,
        non_prune_block_ids=[3],
    ),
}


def build():
    return QWEN.build(layers=5)


def plain(_):
    return BOTH


def third(step):
    return (*BOTH, "third") if step > 5 else BOTH


def changing(step):
    """Branches that come late, pause, and change their order: their steps have other numbers."""
    if step in (0, 1, 12):
        return ("cond",)
    if step in (6, 7, 18, 22):
        return ("uncond",)
    return BOTH if step % 3 else BOTH[::-1]


ORDERS = {"plain": plain, "third": third, "changing": changing}


@torch.no_grad()
def loop(model, order=plain, *, lost=(), kinds=(), wide=None, steps=STEPS, seed=5):
    """Denoise with the branches of `order`; return all outputs.

    `lost`: (step, branch) whose reference is forgotten before; `kinds`: those that are called in
    another way, so that the first such call is an eager one; `wide`: a branch with a batch of two.
    """
    x, outputs = noise(*QWEN.latent_shape, seed=seed), []
    for step in range(steps):
        velocity = 0.0
        for branch in order(step):
            if (step, branch) in lost:
                handle_of(model).force_full("the test says so", branch)
            given = torch.cat([x, -x]) if branch == wide else x
            name = "cond" if branch == "third" else branch
            arguments = QWEN.arguments(given, 1.0 - step / steps, name)
            if branch == "third":
                arguments["encoder_hidden_states"] = noise(1, 6, 24, seed=77)
            if (step, branch) in kinds:
                arguments["attention_kwargs"] = {}
            with model.cache_context(branch):
                outputs.append(model(**arguments)[0])
            velocity = velocity + outputs[-1][:1] * (1.0 if branch == "cond" else -0.4)
        x = x - velocity / steps
    return outputs


def trace(target):
    """Return what each lane did, the changes to the last bit."""
    lanes = dbcache.summary(target, logging=False).lanes
    return {lane.branch: (lane.reasons, lane.diffs, lane.pruned) for lane in lanes}


def same(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def eagerly(target, config):
    """Switch on what is compared with: the host knows who has measured."""
    dbcache.enable(target, config, cfg_diff_compute_separate=False)
    for stack in handle_of(getattr(target, "transformer", target)).stacks:
        stack.prepare_recording()  # each block that is left out adds its own residual
        stack.shared.by_device = False
    return target


def recorded(target, config, mode):
    dbcache.enable(target, config, cfg_diff_compute_separate=False, cuda_graph=mode)
    return target


def number_shared(traces):
    """Return on how many steps `uncond` has the very change of `cond`."""
    cond, uncond = traces["cond"][1], traces["uncond"][1]
    return sum(cond.get(step) == diff for step, diff in uncond.items())


@pytest.mark.parametrize("name", METHODS)
def test_named_branches_decide_as_eager_ones(driver, name):
    model = build()
    expected, eager = loop(eagerly(model, METHODS[name])), trace(model)
    assert number_shared(eager) >= 5
    assert 5 <= eager["uncond"][0].count("below threshold") < STEPS - 3
    for mode in MODES:
        got = loop(recorded(model, METHODS[name], mode))
        assert trace(model) == eager
        assert same(got, expected)
        executor = handle_of(model).graphs
        assert not executor.reasons
        assert executor.replays == 2 * STEPS - 2  # the first call of each branch is an eager one
        assert len(executor.recordings) == 2


@pytest.mark.parametrize("name", ["cache", "prune limits"])
@pytest.mark.parametrize(
    ("mode", "order", "how"),
    [
        ("host", "third", {"lost": [(8, "cond"), (15, "uncond"), (20, "cond"), (20, "uncond")]}),
        ("device", "changing", {"kinds": [(9, "cond"), (10, "cond"), (20, "uncond")]}),
        ("host", "plain", {"wide": "uncond", "steps": 12}),
    ],
    ids=["third", "changing", "wide"],
)
def test_who_measures_is_told_as_eagerly(driver, name, mode, order, how):
    model = build()
    eagerly(model, METHODS[name])
    expected, eager = loop(model, ORDERS[order], **how), trace(model)
    if "wide" in how:
        assert number_shared(eager) == 0
    else:
        assert number_shared(eager) >= 1
        assert number_shared(eager) < len(eager["uncond"][1])
    got = loop(recorded(model, METHODS[name], mode), ORDERS[order], **how)
    assert trace(model) == eager
    assert same(got, expected)
    assert not handle_of(model).graphs.reasons


@pytest.mark.parametrize("mode", MODES)
def test_branches_that_get_the_same_latents_may_as_well_share_their_movement(driver, mode):
    """Only the device knows whether a branch has a rate, and so whether it measured anything."""
    model, options = build(), {"policy": "easycache", "max_warmup_steps": 3}
    how = {"lost": [(8, "cond"), (15, "uncond"), (20, "cond"), (20, "uncond")]}
    runs = []
    for separate in (True, False):
        for graphs in ({}, {"cuda_graph": mode}):
            config = DBCacheConfig(
                residual_diff_threshold=0.4, cfg_diff_compute_separate=separate, **options
            )
            dbcache.enable(model, config, **graphs)
            runs.append((loop(model, third, **how), trace(model)))
    expected, eager = runs[0]
    assert {"no reference", "below threshold"} <= {*eager["cond"][0]} & {*eager["uncond"][0]}
    for got, traces in runs[1:]:
        assert traces == eager
        assert same(got, expected)
    assert not handle_of(model).graphs.reasons


def test_requests_begin_anew_and_recordings_in_their_midst_leave_no_trace(driver):
    """The first calls have another form: what comes after the warm-up is recorded in the loop."""
    model, config = build(), METHODS["cache"]
    kinds = [(step, branch) for step in range(9) for branch in BOTH]
    # what the second request shared last, on step 3, must not be taken over on that of the third
    last = {"seed": 7, "steps": 10, "lost": [(3, "cond")]}
    runs = [{"steps": 12, "kinds": kinds}, {"seed": 6, "steps": 4}, last]
    seen = []
    for switch in (lambda: eagerly(model, config), lambda: recorded(model, config, "device")):
        switch()
        seen.append([])
        for how in runs:
            dbcache.refresh_context(model)
            seen[-1].append((loop(model, **how), trace(model)))
    for (got, traces), (expected, eager) in zip(seen[1], seen[0], strict=True):
        assert traces == eager
        assert same(got, expected)
    assert len(handle_of(model).graphs.recordings) == 4


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("name", ["cache", "prune"])
def test_a_pipeline_that_calls_twice_per_step(driver, name):
    pipe = pipelines.build("Wan 2.1")
    options = {"guided": True, "steps": STEPS}
    expected = pipelines.draw(eagerly(pipe, METHODS[name]), "Wan 2.1", **options)
    eager = trace(pipe)
    assert len(eager) == 2
    assert number_shared(eager) >= 8
    for mode in MODES:
        recorded(pipe, METHODS[name], mode)
        assert torch.equal(pipelines.draw(pipe, "Wan 2.1", **options), expected)
        assert trace(pipe) == eager
        assert f"{2 * STEPS - 2} steps replayed" in "".join(dbcache.summary(pipe).notes)
    dbcache.disable(pipe)


GIVEN = {branch: QWEN.arguments(torch.zeros(QWEN.latent_shape), 1.0, branch) for branch in BOTH}


@torch.no_grad()
def denoise_in_place(model, x, t, times):
    for time in times:
        t.fill_(time)
        one_step(model, x, t)


@torch.no_grad()
def one_step(model, x, t):
    velocity = torch.zeros_like(x)
    for branch in BOTH:
        with model.cache_context(branch):
            output = model(**GIVEN[branch] | {"hidden_states": x, "timestep": t})[0]
        velocity += output * (1.0 if branch == "cond" else -0.4)
    x -= velocity / CAPTURED


@pytest.mark.parametrize("name", ["cache", "prune limits"])
def test_a_users_capture_shares_as_well(capture, name):
    """The whole loop in one graph, and one graph of a step that serves all steps."""
    times = [1.0 - step / CAPTURED for step in range(CAPTURED)]
    model, expected = eagerly(build(), METHODS[name]), []
    x, t = noise(*QWEN.latent_shape, seed=0), torch.ones(1)
    for seed in (1, 2):
        dbcache.refresh_context(model)
        x.copy_(noise(*QWEN.latent_shape, seed=seed))
        denoise_in_place(model, x, t, times)
        expected.append((x.clone(), trace(model)))
    assert number_shared(expected[0][1]) >= 3
    assert expected[0][1] != expected[1][1]

    def whole():
        dbcache.refresh_context(model)
        denoise_in_place(model, x, t, times)

    driver = FakeDriver()
    loop_graph = capture(driver, whole)
    dbcache.refresh_context(model)
    step_graph = capture(driver, lambda: one_step(model, x, t))
    for seed, (latents, traces) in zip((1, 2), expected, strict=True):
        x.copy_(noise(*QWEN.latent_shape, seed=seed))
        loop_graph.replay()
        assert torch.equal(x, latents)
        assert trace(model) == traces
        dbcache.refresh_context(model)
        x.copy_(noise(*QWEN.latent_shape, seed=seed))
        for time in times:
            t.fill_(time)
            step_graph.replay()
        assert torch.equal(x, latents)
        assert trace(model) == traces


@torch.no_grad()
def test_a_captured_branch_takes_over_what_an_eager_one_measured(capture):
    times = [1.0 - step / CAPTURED for step in range(CAPTURED)]
    model = eagerly(build(), METHODS["cache"])
    x, t = noise(*QWEN.latent_shape, seed=1), torch.ones(1)
    denoise_in_place(model, x, t, times)
    expected, traces = x.clone(), trace(model)
    assert number_shared(traces) >= 3
    output = torch.empty_like(x)

    def call(branch):
        with model.cache_context(branch):
            output.copy_(model(**GIVEN[branch] | {"hidden_states": x, "timestep": t})[0])

    dbcache.refresh_context(model)
    uncond = capture(FakeDriver(), lambda: call("uncond"))
    dbcache.refresh_context(model)
    x.copy_(noise(*QWEN.latent_shape, seed=1))
    for time in times:
        t.fill_(time)
        call("cond")
        velocity = output * 1.0
        uncond.replay()
        velocity += output * -0.4
        x -= velocity / CAPTURED
    assert torch.equal(x, expected)
    assert trace(model) == traces
