"""Recorded and replayed against eager: same decisions, same outputs, bit for bit."""

import diffusers
import pytest
import torch
from fake_driver import FakeDriver
from graph_runs import (
    FLUX,
    MODES,
    Loop,
    agree,
    both,
    branches,
    graphs,
    one_stream,
    recordings,
    two_stacks,
)
from tiny import BRANCHES, CFG_SCALE, FAMILIES, denoise, fill, noise

import dbcache
from dbcache import DBCacheConfig, TaylorSeerCalibratorConfig
from dbcache.lanes.step_state import StepState
from dbcache.results.lane import CACHED

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 50
SETTINGS = {
    "reuse": DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.12),
    "limits": DBCacheConfig(
        Fn_compute_blocks=2,
        Bn_compute_blocks=1,
        max_warmup_steps=6,
        warmup_interval=2,
        residual_diff_threshold=0.2,
        max_continuous_cached_steps=3,
        max_cached_steps=20,
        max_accumulated_residual_diff_threshold=0.35,
    ),
    "static": DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=2,
        steps_computation_mask=[1, 1, 1, 1, 0, 0, 1, 0, 0, 1] * 5,
        steps_computation_policy="static",
    ),
    "hidden states": DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=2, l1_hidden_states_diff_threshold=0.05
    ),
}
TAYLOR = TaylorSeerCalibratorConfig(taylorseer_order=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "setting"), [*(("flux", s) for s in SETTINGS), ("wan", "reuse"), ("wan", "limits")]
)
def test_fifty_steps_are_the_same_bit_for_bit(driver, known, name, setting, mode):
    family = FAMILIES[name]
    model, _ = both(
        lambda m: denoise(m, family, STEPS),
        family.build,
        SETTINGS[setting],
        TAYLOR,
        mode=mode,
        known=known[name, setting],
        enable_separate_cfg=False,
    )
    (lane,) = dbcache.summary(model).lanes
    assert 10 <= len(lane.cached_steps) <= 40
    # the first call learns and the others are replayed, warm-up, full and cached steps alike
    assert graphs(model).replays == STEPS - 1
    assert len(recordings(model)) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("named", [True, False])
def test_each_guidance_branch_has_its_own_recording(driver, named, mode):
    family = FAMILIES["qwen"]
    model, traces = both(
        lambda m: denoise(m, family, 20, branches=BRANCHES, named=named),
        family.build,
        SETTINGS["reuse"],
        mode=mode,
        enable_separate_cfg=True,
    )
    assert [branch for _, branch, *_ in traces] == list(BRANCHES)
    assert len(recordings(model)) == 2
    assert graphs(model).replays == 38
    assert CFG_SCALE > 1  # so that a mix-up of the branches changes what follows


@pytest.mark.parametrize("mode", MODES)
def test_two_stacks_are_two_branches_of_one_graph(driver, mode):
    adapter, traces = both(
        lambda a: denoise(a.transformer, FLUX, STEPS),
        lambda: two_stacks(FLUX.build()),
        SETTINGS["reuse"],
        residual_diff_threshold=0.2,
        mode=mode,
    )
    first, second = ([reason in CACHED for reason in reasons] for _, _, reasons, *_ in traces)
    assert first != second, "the stacks must decide apart for this test to mean anything"
    (recording,) = recordings(adapter)
    assert [type(item).__name__ for item in recording.replay.program] == [
        "Tape", "Branch", "Tape", "Branch", "Tape",
    ]  # fmt: skip
    assert recording.replay.mode == mode


@pytest.mark.parametrize("mode", MODES)
def test_stacks_that_follow_the_first_one_are_branches_on_its_decision(driver, mode):
    adapter, _ = both(
        lambda a: denoise(a.transformer, FLUX, STEPS),
        lambda: two_stacks(FLUX.build()),
        SETTINGS["reuse"],
        TAYLOR,
        decision_scope="model",
        residual_diff_threshold=0.15,
        mode=mode,
    )
    assert 10 < len(dbcache.summary(adapter).lanes[0].cached_steps) < 45
    (recording,) = recordings(adapter)
    assert len(branches(recording)) == 2


@torch.no_grad()
def test_stacks_that_follow_tell_all_steps_of_a_captured_one(capture):
    """The host sees none of the steps that the user's graph takes."""
    model = FLUX.build()
    adapter = two_stacks(model)
    dbcache.enable(adapter, SETTINGS["reuse"], residual_diff_threshold=0.15, decision_scope="model")
    loop = Loop(model, steps=12)
    expected = loop.run(1)
    _, (_, _, reasons, *_) = expected[1]
    assert "below threshold" in reasons
    dbcache.refresh_context(adapter)
    graph = capture(FakeDriver(), loop.one)
    assert agree(loop.replay_steps(graph, 1), expected)


def hunyuan_dit():
    """Return a HunyuanDiT of six blocks, whose later half takes long skips from the first."""
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        text_len=4,
        text_len_t5=4,
        pooled_projection_dim=12,
        norm_type="layer_norm",
        learn_sigma=False,
    )
    return fill(model, 4)


@torch.no_grad()
def denoise_hunyuan_dit(model):
    cos = torch.cos(torch.linspace(0, 3, 16 * 16)).view(16, 16)
    fixed = {
        "encoder_hidden_states": noise(1, 4, 16, seed=1),
        "text_embedding_mask": torch.ones(1, 4),
        "encoder_hidden_states_t5": noise(1, 4, 16, seed=2),
        "text_embedding_mask_t5": torch.ones(1, 4),
        "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]]),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": (cos, cos.flip(0)),
    }
    x, outputs = noise(1, 4, 8, 8, seed=3), []
    for step in range(STEPS):
        t = torch.tensor([1000 * (1 - step / STEPS)])
        output = model(x, t, return_dict=False, **fixed)[0]
        outputs.append(output)
        x = x - output / STEPS
    return outputs


LAST = {
    "Fn_compute_blocks": 2,
    "Bn_compute_blocks": 2,
    "Bn_compute_blocks_ids": [1],
    "non_compute_blocks_diff_threshold": 0.05,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("last", [{}, {"Bn_compute_blocks": 1}, LAST], ids=["B0", "B1", "B2"])
def test_long_skips_are_recorded_right(driver, mode, last):
    calls = []

    def build():
        model = hunyuan_dit()
        if not calls:  # the eager one's
            model.blocks[-2].register_forward_pre_hook(lambda *_: calls.append(0))
        return one_stream(model)

    options = {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 3,
        "residual_diff_threshold": 0.1,
    } | last
    adapter, _ = both(lambda a: denoise_hunyuan_dit(a.transformer), build, **options, mode=mode)
    (lane,) = dbcache.summary(adapter).lanes
    cached = len(lane.cached_steps)
    assert 5 < cached < STEPS - 3
    if last is LAST:
        assert STEPS - cached < len(calls) < STEPS, "left out on some of the cached steps"
    assert graphs(adapter).replays == STEPS - 1


def test_host_mode_reads_only_what_the_plan_leaves_open(driver, monkeypatch):
    reads = []
    read = StepState.read_flag
    monkeypatch.setattr(StepState, "read_flag", lambda s: reads.append(s.step) or read(s))
    model = FLUX.build()
    dbcache.enable(model, SETTINGS["static"], cuda_graph="host")
    denoise(model, FLUX, 3)
    assert len(reads) == 2  # of the dynamic step that is tried, eager and replayed
    dbcache.refresh_context(model)
    reads.clear()
    denoise(model, FLUX, STEPS)
    assert graphs(model).replays == 3 - 1 + STEPS
    assert reads == []
    dbcache.enable(model, SETTINGS["reuse"], cuda_graph="host")
    denoise(model, FLUX, 3)
    dbcache.refresh_context(model)
    reads.clear()
    denoise(model, FLUX, 20)
    assert reads == list(range(4, 20))


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("calibrator", [None, TAYLOR], ids=["reuse", "order 2"])
def test_a_cached_body_predicts_in_place_and_copies_nothing(driver, name, calibrator):
    family = FAMILIES[name]
    model = family.build()
    dbcache.enable(model, SETTINGS["reuse"], calibrator, cuda_graph="host")
    denoise(model, family, 3)
    for recording in graphs(model).recordings.values():
        (branch,) = [part for part in recording.replay.program if hasattr(part, "cached")]
        ops = [op._schema.name for op, *_ in branch.cached.entries]
        streams = 2 if name == "flux" else 1
        assert ops == (["dbcache::predict"] if calibrator else ["aten::add"] * streams)


def test_device_mode_reads_nothing_and_launches_once_per_step(driver, monkeypatch):
    model = FLUX.build()
    dbcache.enable(model, SETTINGS["reuse"], cuda_graph="device")
    denoise(model, FLUX, 3)

    def fail(lane):
        raise AssertionError("the host asked for a decision")

    monkeypatch.setattr(StepState, "read_flag", fail)
    dbcache.refresh_context(model, num_inference_steps=20)
    before = driver.launches
    denoise(model, FLUX, 20)
    assert driver.launches == before + 20
    summary = dbcache.summary(model)
    assert summary.lanes[0].cached_steps, "the trace is read after the loop"
