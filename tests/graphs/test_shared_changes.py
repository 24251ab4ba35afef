"""Branches that take over each other's change, recorded, against eager steps: the same bits.

Eagerly the host knows who has measured and the others do not measure; recorded, all of them measure
and the device decides what counts.
"""

import inside
import pipelines
import pytest
import torch
from fake_driver import FakeDriver
from graph_runs import (
    MODES,
    Loop,
    agree,
    both,
    decide_as_recorded,
    eagerly,
    graphs,
    recordings,
    same,
    traces,
)
from tiny import BRANCHES, FAMILIES, noise

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig

pytestmark = pytest.mark.usefixtures("one_thread")

QWEN = FAMILIES["qwen"]
STEPS = 30
CAPTURED = 10
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
    return BRANCHES


def third(step):
    return (*BRANCHES, "third") if step > 5 else BRANCHES


def changing(step):
    """Branches that come late, pause, and change their order: their steps have other numbers."""
    if step in (0, 1, 12):
        return ("cond",)
    if step in (6, 7, 18, 22):
        return ("uncond",)
    return BRANCHES if step % 3 else BRANCHES[::-1]


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
                inside.request(model).force_full("the test says so", branch)
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


def enable_shared(target, config, **options):
    """Let branches share their changes; without graphs the host knows who has measured."""
    dbcache.enable(target, config, cfg_diff_compute_separate=False, **options)
    if not options:
        decide_as_recorded(target)
    return target


def changes_of(decided):
    """Return the changes of each branch, by step."""
    return {branch: changes for _, branch, _, changes, _ in decided}


def reasons_of(decided):
    return {branch: reasons for _, branch, reasons, *_ in decided}


def number_shared(decided):
    """Return on how many steps `uncond` has the very change of `cond`."""
    cond, uncond = map(changes_of(decided).get, BRANCHES)
    return sum(cond.get(step) == diff for step, diff in uncond.items())


@pytest.mark.parametrize("name", METHODS)
def test_named_branches_decide_as_eager_ones(driver, name):
    expected, eager = eagerly(loop, build(), METHODS[name], cfg_diff_compute_separate=False)
    assert number_shared(eager) >= 5
    assert 5 <= reasons_of(eager)["uncond"].count("below threshold") < STEPS - 3
    model = build()
    for mode in MODES:
        got = loop(enable_shared(model, METHODS[name], cuda_graph=mode))
        assert traces(model) == eager
        assert same(got, expected)
        assert not graphs(model).reasons
        # the first call of each branch is an eager one
        assert graphs(model).replays == 2 * STEPS - 2
        assert len(recordings(model)) == 2


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
    _, eager = both(
        lambda m: loop(m, ORDERS[order], **how),
        build,
        METHODS[name],
        cfg_diff_compute_separate=False,
        mode=mode,
    )
    if "wide" in how:
        assert number_shared(eager) == 0
    else:
        assert number_shared(eager) >= 1
        assert number_shared(eager) < len(changes_of(eager)["uncond"])


@pytest.mark.parametrize("mode", MODES)
def test_branches_that_get_the_same_latents_may_as_well_share_their_movement(driver, mode):
    """Only the device knows whether a branch has a rate, and so whether it measured anything."""
    model, options = build(), {"policy": "easycache", "max_warmup_steps": 3}
    how = {"lost": [(8, "cond"), (15, "uncond"), (20, "cond"), (20, "uncond")]}
    runs = []
    for separate in (True, False):
        for recorded in ({}, {"cuda_graph": mode}):
            config = DBCacheConfig(
                residual_diff_threshold=0.4, cfg_diff_compute_separate=separate, **options
            )
            dbcache.enable(model, config, **recorded)
            runs.append((loop(model, third, **how), traces(model)))
    expected, eager = runs[0]
    reasons = reasons_of(eager)
    assert {"no reference", "below threshold"} <= {*reasons["cond"]} & {*reasons["uncond"]}
    for got, decided in runs[1:]:
        assert decided == eager
        assert same(got, expected)
    assert not graphs(model).reasons


def test_requests_begin_anew_and_recordings_in_their_midst_leave_no_trace(driver):
    """The first calls have another form: what comes after the warm-up is recorded in the loop."""
    model, config = build(), METHODS["cache"]
    kinds = [(step, branch) for step in range(9) for branch in BRANCHES]
    # what the second request shared last, on step 3, must not be taken over on that of the third
    last = {"seed": 7, "steps": 10, "lost": [(3, "cond")]}
    runs = [{"steps": 12, "kinds": kinds}, {"seed": 6, "steps": 4}, last]
    seen = []
    for options in ({}, {"cuda_graph": "device"}):
        enable_shared(model, config, **options)
        seen.append([])
        for how in runs:
            dbcache.refresh_context(model)
            seen[-1].append((loop(model, **how), traces(model)))
    for (got, decided), (expected, eager) in zip(seen[1], seen[0], strict=True):
        assert decided == eager
        assert same(got, expected)
    assert len(recordings(model)) == 4


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("name", ["cache", "prune"])
def test_a_pipeline_that_calls_twice_per_step(driver, name):
    pipe = pipelines.build("Wan 2.1")
    options = {"guided": True, "steps": STEPS}
    expected = pipelines.draw(enable_shared(pipe, METHODS[name]), "Wan 2.1", **options)
    eager = traces(pipe)
    assert len(eager) == 2
    assert number_shared(eager) >= 8
    for mode in MODES:
        enable_shared(pipe, METHODS[name], cuda_graph=mode)
        assert torch.equal(pipelines.draw(pipe, "Wan 2.1", **options), expected)
        assert traces(pipe) == eager
        assert f"{2 * STEPS - 2} steps replayed" in "".join(dbcache.summary(pipe).notes)
    dbcache.disable(pipe)


GIVEN = {branch: QWEN.arguments(torch.zeros(QWEN.latent_shape), 1.0, branch) for branch in BRANCHES}


def loop_in_place(model):
    """Return the same denoising, to be captured."""

    def step(x, t):
        velocity = torch.zeros_like(x)
        for branch in BRANCHES:
            with model.cache_context(branch):
                output = model(**GIVEN[branch] | {"hidden_states": x, "timestep": t})[0]
            velocity += output * (1.0 if branch == "cond" else -0.4)
        x -= velocity / CAPTURED

    return Loop(model, CAPTURED, step, QWEN.latent_shape)


@pytest.mark.parametrize("name", ["cache", "prune limits"])
def test_a_users_capture_shares_as_well(capture, name):
    """The whole loop in one graph, and one graph of a step that serves all steps."""
    model = enable_shared(build(), METHODS[name])
    denoising = loop_in_place(model)
    expected = {seed: denoising.run(seed) for seed in (1, 2)}
    assert number_shared(expected[1][1]) >= 3
    assert expected[1][1] != expected[2][1]
    driver = FakeDriver()
    loop_graph = capture(driver, denoising.whole)
    dbcache.refresh_context(model)
    step_graph = capture(driver, denoising.one)
    for seed, run in expected.items():
        assert agree(denoising.replay(loop_graph, seed), run)
        assert agree(denoising.replay_steps(step_graph, seed), run)


@torch.no_grad()
def test_a_captured_branch_takes_over_what_an_eager_one_measured(capture):
    model = enable_shared(build(), METHODS["cache"])
    denoising = loop_in_place(model)
    expected, decided = denoising.run(1)
    assert number_shared(decided) >= 3
    x, t = denoising.x, denoising.t
    output = torch.empty_like(x)

    def call(branch):
        with model.cache_context(branch):
            output.copy_(model(**GIVEN[branch] | {"hidden_states": x, "timestep": t})[0])

    dbcache.refresh_context(model)
    uncond = capture(FakeDriver(), lambda: call("uncond"))
    dbcache.refresh_context(model)
    x.copy_(noise(*QWEN.latent_shape, seed=1))
    for time in denoising.times:
        t.fill_(time)
        call("cond")
        velocity = output * 1.0
        uncond.replay()
        velocity += output * -0.4
        x -= velocity / CAPTURED
    assert torch.equal(x, expected)
    assert traces(model) == decided
