"""`enable` on what is enabled: recordings stay where nothing changed that they hold."""

import inside
import pytest
import torch
from graph_runs import FLUX, MODES, OPTIONS, graphs, recordings, same, traces
from tiny import denoise, generate, pipeline

import dbcache
from dbcache import BlockAdapter, ForwardPattern

pytestmark = pytest.mark.usefixtures("one_thread")

PRUNED = {**OPTIONS, "cache_type": "DBPrune", "non_prune_block_ids": [3]}


def adapter(model, **changes):
    parts = {"transformer": model, "blocks": model.transformer_blocks}
    return BlockAdapter(**parts, forward_pattern=ForwardPattern.Pattern_1, **changes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [OPTIONS, PRUNED], ids=["cache", "prune"])
def test_other_numbers_are_served_by_the_same_recordings(driver, options, mode):
    model, fresh = FLUX.build(), FLUX.build()
    dbcache.enable(model, **options, cuda_graph=mode)
    denoise(model, FLUX, 6)
    (recorded,) = recordings(model)
    lane = inside.stacks(model)[0].lanes[None]
    seen = set()
    for changes in (
        {"residual_diff_threshold": 0.05},
        {"max_warmup_steps": 1, "max_continuous_cached_steps": 1},
        {"steps_computation_mask": [1, 0, 1, 0, 0, 1, 0, 0, 0, 0]},
    ):
        before = graphs(model).replays
        dbcache.enable(model, **options | changes, cuda_graph=mode)
        assert not len(inside.handle(model).implicit), "the last request is over"
        got = denoise(model, FLUX, 10)
        # a fresh model's first step is an eager one
        dbcache.enable(fresh, **options | changes, cuda_graph=mode)
        graphs(fresh).retire()
        assert same(got, denoise(fresh, FLUX, 10))
        assert traces(model) == traces(fresh)
        seen.add(str(traces(model)))
        assert recordings(model) == [recorded]
        assert inside.stacks(model)[0].lanes[None] is lane
        assert graphs(model).replays == before + 10
    assert len(seen) == 3
    dbcache.disable(model)
    assert recorded.replay.__dict__.get("graph") is None
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("name", ["qwen", "wan2.2"])
def test_pipelines_and_all_their_transformers_keep_theirs(driver, name):
    pipe, fresh = pipeline(name), pipeline(name)
    parts = [x for x in (pipe.transformer, getattr(pipe, "transformer_2", None)) if x is not None]
    dbcache.enable(pipe, **OPTIONS, cuda_graph="device")
    generate(pipe, 12)
    recorded = [recordings(part) for part in parts]
    assert [len(each) for each in recorded] == [2] * len(parts)
    dbcache.enable(pipe, **OPTIONS | {"residual_diff_threshold": 0.05}, cuda_graph="device")
    got = generate(pipe, 12)
    assert [recordings(part) for part in parts] == recorded
    assert not driver.destroyed
    dbcache.enable(fresh, **OPTIONS | {"residual_diff_threshold": 0.05})
    assert same(got, generate(fresh, 12))
    assert traces(pipe) == traces(fresh)
    dbcache.disable(pipe)
    assert len(driver.destroyed) == 2 * 2 * len(parts)  # a graph each, and what was made of it
    assert not any("forward" in part.__dict__ for part in parts)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"Fn_compute_blocks": 2}),
        ({}, {"Bn_compute_blocks": 1}),
        ({}, {"cache_dtype": "fp8"}),
        ({}, {"cfg_diff_compute_separate": False}),
        ({}, {"enable_taylorseer": True}),
        ({}, {"cuda_graph": "host"}),
        ({}, {"cuda_graph": False}),
        ({}, {"cache_type": "DBPrune"}),
        ({"enable_taylorseer": True, "taylorseer_order": 1}, {"taylorseer_order": 2}),
        # as many blocks that may be left out, but not the same ones
        (PRUNED | {"non_prune_block_ids": [1]}, {"non_prune_block_ids": [9]}),
    ],
    ids=lambda given: ",".join(key for key in given if key not in OPTIONS),
)
def test_what_a_recording_holds_makes_it_void(driver, first, then):
    model, fresh = FLUX.build(), FLUX.build()
    dbcache.enable(model, **OPTIONS | {"cuda_graph": "device"} | first)
    denoise(model, FLUX, 4)
    dbcache.enable(model, **OPTIONS | {"cuda_graph": "device"} | first | then)
    assert len(driver.destroyed) == 2
    got = denoise(model, FLUX, 8)
    dbcache.enable(fresh, **OPTIONS | {"cuda_graph": "device"} | first | then)
    assert same(got, denoise(fresh, FLUX, 8))
    assert traces(model) == traces(fresh)


@pytest.mark.parametrize(
    "changes", [{"patch_functor": lambda model: None}, {"blocks": "single_transformer_blocks"}]
)
def test_another_adapter_makes_them_void(driver, changes):
    model = FLUX.build()
    dbcache.enable(adapter(model), **OPTIONS, cuda_graph="device")
    denoise(model, FLUX, 4)
    executor = graphs(model)
    dbcache.enable(adapter(model), **OPTIONS | {"max_warmup_steps": 1}, cuda_graph="device")
    assert graphs(model) is executor
    if "blocks" in changes:
        changes = {"blocks": getattr(model, changes["blocks"])}
        other = BlockAdapter(transformer=model, **changes, forward_pattern=ForwardPattern.Pattern_1)
    else:
        other = adapter(model, **changes)
    dbcache.enable(other, **OPTIONS, cuda_graph="device")
    assert graphs(model) is not executor
    assert not executor.recordings


def test_what_is_refused_leaves_the_old_cache_and_its_recordings(driver):
    model, fresh = FLUX.build(), FLUX.build()
    dbcache.enable(model, **OPTIONS, num_inference_steps=8, cuda_graph="device")
    denoise(model, FLUX, 8)
    setup = inside.handle(model).setup
    (recorded,) = recordings(model)
    dbcache.register_predictor("asks the host")(lambda steps, step: [1.0])
    on_host = dbcache.CustomCalibratorConfig(predictor_name="asks the host")
    for refused in (
        {"residual_diff_threshold": "much"},
        {"Bn_compute_blocks": 2, "Bn_compute_blocks_ids": [4]},
        {"policy": "magcache"},  # without a calibration
        {"calibrator_config": on_host},
        {"parms": 1},
    ):
        with pytest.raises((TypeError, ValueError)):
            dbcache.enable(model, **OPTIONS | refused, cuda_graph="device")
    assert inside.handle(model).setup is setup
    got = denoise(model, FLUX, 8)
    assert recordings(model) == [recorded]
    dbcache.enable(fresh, **OPTIONS)
    assert same(got, denoise(fresh, FLUX, 8))


def test_a_mode_that_failed_is_tried_again(without_driver):
    model = FLUX.build()
    for _ in range(2):
        dbcache.enable(model, **OPTIONS, cuda_graph="device")
        with pytest.raises(RuntimeError, match="cuda_graph='device' is impossible here"):
            denoise(model, FLUX, 4)
    dbcache.disable(model)


def test_weights_that_moved_meanwhile_are_recorded_anew(driver):
    model = FLUX.build()
    dbcache.enable(model, **OPTIONS, cuda_graph="device")
    denoise(model, FLUX, 4)
    executor = graphs(model)
    block = model.transformer_blocks[2]
    block.ff.net[2].weight = torch.nn.Parameter(block.ff.net[2].weight * 1.5)
    dbcache.enable(model, **OPTIONS | {"max_warmup_steps": 2}, cuda_graph="device")
    got = denoise(model, FLUX, 6)
    assert executor.retired == 1
    dbcache.enable(model, **OPTIONS | {"max_warmup_steps": 2})
    assert same(got, denoise(model, FLUX, 6))


def test_pipelines_that_share_a_transformer_keep_theirs(driver):
    pipe = pipeline("qwen")
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    for each in (pipe, other):
        dbcache.enable(each, **OPTIONS, cuda_graph="device")
    generate(other, 8)
    executor = graphs(pipe)
    recorded = recordings(pipe)
    dbcache.enable(pipe, **OPTIONS | {"residual_diff_threshold": 0.05}, cuda_graph="device")
    generate(other, 8)
    assert graphs(pipe) is executor
    assert recordings(pipe) == recorded
    dbcache.disable(pipe)
    assert not driver.destroyed
    dbcache.disable(other)
    assert len(driver.destroyed) == 4
