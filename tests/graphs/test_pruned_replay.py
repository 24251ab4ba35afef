"""DBPrune recorded and replayed, a branch per block, against eager: same decisions, same bits."""

import inside
import pytest
import torch
from fake_driver import FakeDriver
from graph_runs import (
    FLUX,
    MODES,
    both,
    branches,
    eagerly,
    graphs,
    recordings,
    same,
    start,
    traces,
    two_stacks,
)
from tiny import BRANCHES, FAMILIES, denoise

import dbcache
from dbcache import DBPruneConfig
from dbcache.lanes.block_store import BlockStore

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 50
MASK = [1, 1, 1, 1, 0, 0, 1, 0, 0, 1] * 5
SETTINGS = {
    "one by one": {"max_warmup_steps": 3, "residual_diff_threshold": 0.07},
    "limits": {
        "Fn_compute_blocks": 2,
        "Bn_compute_blocks": 1,
        "max_warmup_steps": 6,
        "warmup_interval": 2,
        "residual_diff_threshold": 0.12,
        "max_continuous_cached_steps": 3,
        "max_pruned_steps": 20,
        "non_prune_block_ids": [4],
    },
    "static": {"steps_computation_mask": MASK, "steps_computation_policy": "static"},
    "mask": {
        "steps_computation_mask": MASK,
        "residual_diff_threshold": 0.08,
        "residual_cache_update_interval": 3,
        "enable_dynamic_prune_threshold": True,
    },
}


def config(setting, **changes):
    return DBPruneConfig(**{"Fn_compute_blocks": 1} | SETTINGS[setting] | changes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "setting"), [*(("flux", s) for s in SETTINGS), ("wan", "one by one"), ("wan", "mask")]
)
def test_fifty_steps_are_the_same_bit_for_bit(driver, known, name, setting, mode):
    family = FAMILIES[name]
    model, ((_, _, reasons, _, pruned),) = both(
        lambda m: denoise(m, family, STEPS),
        family.build,
        config(setting),
        mode=mode,
        known=known[name, setting],
        enable_separate_cfg=False,
    )
    (stack,) = inside.stacks(model)
    assert 10 <= sum(map(bool, pruned)) <= 47
    assert len(reasons) == STEPS
    if setting == "mask" or (name, setting) == ("wan", "one by one"):
        most = len(stack.prunable)
        assert len({len(step) for step in pruned} - {0, most}) > 1, "blocks must decide apart"
    assert graphs(model).replays == STEPS - 1
    (recording,) = recordings(model)
    assert len(branches(recording)) == sum(stack.prunable)


@pytest.mark.parametrize("mode", MODES)
def test_neighbours_that_eager_leaves_out_in_one_go_differ_in_rounding_alone(driver, mode):
    model = FLUX.build()
    dbcache.enable(model, config("limits"))
    expected, (eager,) = denoise(model, FLUX, STEPS), traces(model)
    dbcache.enable(model, config("limits"), cuda_graph=mode)
    got, (recorded,) = denoise(model, FLUX, STEPS), traces(model)
    assert recorded[2] == eager[2]
    assert recorded[4] == eager[4]
    assert any({2, 3} <= set(step) for step in eager[4])
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_each_guidance_branch_has_its_own_lane_and_recording(driver, mode):
    family = FAMILIES["wan"]
    model, (cond, uncond) = both(
        lambda m: denoise(m, family, 20, branches=BRANCHES, named=False),
        family.build,
        config("one by one"),
        mode=mode,
        enable_separate_cfg=True,
    )
    assert (cond[1], uncond[1]) == BRANCHES
    assert cond[4] != uncond[4]
    assert len(recordings(model)) == 2
    assert graphs(model).replays == 38


@pytest.mark.parametrize("mode", MODES)
def test_two_stacks_have_a_branch_per_block_that_may_be_left_out(driver, mode):
    adapter, decided = both(
        lambda a: denoise(a.transformer, FLUX, 24),
        lambda: two_stacks(FLUX.build()),
        config("one by one", non_prune_block_ids=[2]),
        mode=mode,
    )
    assert all(any(pruned) for *_, pruned in decided)
    (recording,) = recordings(adapter)
    assert len(branches(recording)) == 2 + 4
    if mode == "device":
        names = [item.name for item in branches(recording)]
        assert names[0].startswith("transformer_blocks[1] ")
        assert names[-1].startswith("single_transformer_blocks[5] ")


def test_host_mode_reads_once_per_undecided_step(driver, monkeypatch):
    model, reads = FLUX.build(), []
    read = BlockStore.read
    monkeypatch.setattr(BlockStore, "read", lambda cache, x: reads.append(0) or read(cache, x))
    dbcache.enable(model, config("static"), cuda_graph="host")
    denoise(model, FLUX, 3)
    assert len(reads) == 2  # of the dynamic step that is tried, eager and replayed
    dbcache.refresh_context(model)
    reads.clear()
    denoise(model, FLUX, STEPS)
    assert graphs(model).replays == 3 - 1 + STEPS
    assert reads == []
    dbcache.enable(model, config("limits"), cuda_graph="host")
    denoise(model, FLUX, 3)
    dbcache.refresh_context(model)
    reads.clear()
    denoise(model, FLUX, STEPS)
    (lane,) = dbcache.summary(model).lanes
    undecided = ("below threshold", "above threshold")
    assert len(reads) == sum(reason in undecided for reason in lane.reasons)
    assert {"consecutive limit", "count limit"} <= set(lane.reasons)


def test_device_mode_reads_nothing_and_launches_once_per_step(driver, monkeypatch):
    model = FLUX.build()
    dbcache.enable(model, config("one by one"), cuda_graph="device")
    denoise(model, FLUX, 3)

    def fail(*_):
        raise AssertionError("the host asked for a decision")

    monkeypatch.setattr(BlockStore, "read", fail)
    dbcache.refresh_context(model, num_inference_steps=20)
    before = driver.launches
    denoise(model, FLUX, 20)
    assert driver.launches == before + 20
    (lane,) = dbcache.summary(model).lanes
    assert len(lane.pruned) == 20
    assert any(lane.pruned), "the trace is read after the loop"


@pytest.mark.parametrize("mode", MODES)
def test_numbers_change_without_a_new_recording_and_blocks_do_not(driver, mode):
    model = FLUX.build()
    dbcache.enable(model, config("one by one"), cuda_graph=mode, num_inference_steps=12)
    denoise(model, FLUX, 12)
    (recorded,) = recordings(model)
    given = {}
    for changes in (
        {"residual_diff_threshold": 0.15, "max_continuous_cached_steps": 1},
        {"residual_cache_update_interval": 2, "batch_reduce": "max"},
        {"non_prune_block_ids": [3]},
    ):
        given |= changes
        expected, eager = eagerly(
            lambda m: denoise(m, FLUX, 12), FLUX.build(), config("one by one", **given)
        )
        dbcache.refresh_context(model, **changes)
        got = denoise(model, FLUX, 12)
        assert traces(model) == eager
        assert same(got, expected)
        (now,) = recordings(model)
        assert (now is recorded) == ("non_prune_block_ids" not in changes)


@pytest.mark.parametrize("mode", MODES)
def test_other_shapes_have_their_own_recordings_and_a_rule_that_holds_for_all(driver, mode):
    model = FLUX.build()
    dbcache.enable(model, config("one by one"), cuda_graph=mode, num_inference_steps=8)
    for threshold, batch in ((0.07, 1), (0.07, 2), (0.15, 2), (0.15, 1)):
        dbcache.refresh_context(model, residual_diff_threshold=threshold)
        got = denoise(model, FLUX, 8, batch=batch)
        expected, eager = eagerly(
            lambda m, n=batch: denoise(m, FLUX, 8, batch=n),
            FLUX.build(),
            config("one by one", residual_diff_threshold=threshold),
        )
        assert traces(model) == eager
        assert same(got, expected)
    assert len(recordings(model)) == 2


def test_a_failed_launch_counts_as_never_begun(driver, monkeypatch):
    model = FLUX.build()
    dbcache.enable(model, config("one by one"), cuda_graph="device", num_inference_steps=8)
    denoise(model, FLUX, 4)

    def fail(*_):
        raise RuntimeError("lost the GPU")

    x = start(1)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(FakeDriver, "do_cuGraphLaunch", fail)
        with pytest.raises(RuntimeError, match="lost the GPU"):
            model(**FLUX.arguments(x, 0.5, "cond"))
    with torch.no_grad():
        model(**FLUX.arguments(x, 0.5, "cond"))
    (lane,) = dbcache.summary(model).lanes
    assert lane.reasons[4:] == ["no reference"]
    assert lane.pruned[4:] == [[]]


def test_eager_steps_between_replayed_ones_know_the_counts(driver):
    """What does not fit a recording runs eagerly, and keeps to the limits all the same."""
    model = FLUX.build()
    options = {"residual_diff_threshold": 1.0, "max_pruned_steps": 6}
    dbcache.enable(model, config("one by one", **options), cuda_graph="device")
    x = start(1)
    with torch.no_grad():
        for step in range(14):
            # the first call of a kind is an eager one
            how = {"return_dict": step >= 7}
            model(**FLUX.arguments(x, 1 - step / 14, "cond") | how)
    (lane,) = dbcache.summary(model).lanes
    always = "threshold is 1 or more"
    assert lane.reasons == ["warm-up"] * 3 + [always] * 6 + ["count limit"] * 5
    assert graphs(model).replays == 12


@pytest.mark.parametrize("mode", MODES)
def test_eager_steps_do_not_go_by_counts_from_before_replayed_ones(driver, mode):
    options = {"residual_diff_threshold": 1.0, "max_warmup_steps": 1}
    rule = config("one by one", **options, max_continuous_cached_steps=2)
    kinds = "aaaaabac"  # the first call of a kind is an eager one

    @torch.no_grad()
    def run(model):
        outputs = []
        for step, kind in enumerate(kinds):
            given = FLUX.arguments(start(1) * (1 - step / 20), 1 - step / 8, "cond")
            given |= {"return_dict": kind != "a", "joint_attention_kwargs": {"kind": kind}}
            outputs.append(model(**given)[0])
        return outputs

    _, ((*_, pruned),) = both(run, FLUX.build, rule, mode=mode)
    assert [bool(step) for step in pruned] == [False, True, True] * 2 + [False, True]
