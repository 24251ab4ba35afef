"""Recorded and replayed against eager: same decisions, same outputs, bit for bit."""

import diffusers
import pytest
import torch
from fake_driver import FakeDriver
from tiny import CFG_SCALE, FAMILIES, denoise, fill, noise

import dbcache
from dbcache import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig
from dbcache.adapters.cached_transformer import handle_of
from dbcache.kernels.lane_state import Reason

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 50
MODES = ("host", "device")
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


def trace(model):
    return {
        (stack.name, branch): lane.trace()
        for stack in handle_of(model).stacks
        for branch, lane in stack.lanes.items()
    }


def both(run, model, *args, mode, **options):
    """Run eagerly and recorded; check that they agree; return the handle and the traces."""
    dbcache.enable(model, *args, **options)
    expected, eager = run(model), trace(model)
    dbcache.enable(model, *args, **options, cuda_graph=mode)
    got = run(model)
    handle = handle_of(model)
    assert trace(model) == eager
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
    assert not handle.graphs.reasons
    return handle, eager


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "setting"), [*(("flux", s) for s in SETTINGS), ("wan", "reuse"), ("wan", "limits")]
)
def test_fifty_steps_are_the_same_bit_for_bit(driver, name, setting, mode):
    family = FAMILIES[name]
    model = family.build()
    handle, traces = both(
        lambda m: denoise(m, family, STEPS),
        model,
        SETTINGS[setting],
        TAYLOR,
        mode=mode,
        enable_separate_cfg=False,
    )
    reasons = next(iter(traces.values()))[0]
    cached = sum(Reason(code).cached for code in reasons)
    assert 10 <= cached <= 40
    # the first call learns and the others are replayed, warm-up, full and cached steps alike
    assert handle.graphs.replays == STEPS - 1
    assert len(handle.graphs.recordings) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("named", [True, False])
def test_each_guidance_branch_has_its_own_recording(driver, named, mode):
    family = FAMILIES["qwen"]
    handle, traces = both(
        lambda m: denoise(m, family, 20, branches=("cond", "uncond"), named=named),
        family.build(),
        SETTINGS["reuse"],
        mode=mode,
        enable_separate_cfg=True,
    )
    assert {branch for _, branch in traces} == {"cond", "uncond"}
    assert len(handle.graphs.recordings) == 2
    assert handle.graphs.replays == 38
    assert CFG_SCALE > 1  # so that a mix-up of the branches changes what follows


@pytest.mark.parametrize("mode", MODES)
def test_two_stacks_are_two_branches_of_one_graph(driver, mode):
    family = FAMILIES["flux"]
    model = family.build()
    adapter = BlockAdapter(
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_1],
    )

    def run(_):
        return denoise(model, family, STEPS)

    dbcache.enable(adapter, SETTINGS["reuse"], residual_diff_threshold=0.2)
    expected, eager = run(model), trace(model)
    dbcache.enable(adapter, SETTINGS["reuse"], residual_diff_threshold=0.2, cuda_graph=mode)
    got = run(model)
    assert trace(model) == eager
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    first, second = ([Reason(code).cached for code in reasons] for reasons, _ in eager.values())
    assert first != second, "the stacks must decide apart for this test to mean anything"
    (recording,) = handle_of(model).graphs.recordings.values()
    assert [type(item).__name__ for item in recording.replay.program] == [
        "Tape", "Branch", "Tape", "Branch", "Tape",
    ]  # fmt: skip
    assert recording.replay.mode == mode


@pytest.mark.parametrize("mode", MODES)
def test_stacks_that_follow_the_first_one_are_branches_on_its_decision(driver, mode):
    family = FAMILIES["flux"]
    model = family.build()
    adapter = BlockAdapter(
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_1],
    )
    options = {"decision_scope": "model", "residual_diff_threshold": 0.15}
    dbcache.enable(adapter, SETTINGS["reuse"], TAYLOR, **options)
    expected, eager = denoise(model, family, STEPS), trace(model)
    dbcache.enable(adapter, SETTINGS["reuse"], TAYLOR, **options, cuda_graph=mode)
    got = denoise(model, family, STEPS)
    assert trace(model) == eager
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert 10 < sum(Reason(code).cached for code in next(iter(eager.values()))[0]) < 45
    (recording,) = handle_of(model).graphs.recordings.values()
    assert sum(type(item).__name__ == "Branch" for item in recording.replay.program) == 2


@torch.no_grad()
def test_stacks_that_follow_tell_all_steps_of_a_captured_one(capture):
    """The host sees none of the steps that the user's graph takes."""
    family, steps = FAMILIES["flux"], 12
    model, x, t = family.build(), noise(*family.latent_shape, seed=1), torch.ones(1)
    adapter = BlockAdapter(
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_1],
    )
    dbcache.enable(adapter, SETTINGS["reuse"], residual_diff_threshold=0.15, decision_scope="model")
    arguments = family.arguments(x, 1.0, "cond") | {"timestep": t}

    def one():
        x.sub_(model(**arguments)[0] / steps)

    def loop(do):
        dbcache.refresh_context(adapter)
        x.copy_(noise(*family.latent_shape, seed=1))
        for step in range(steps):
            t.fill_(1.0 - step / steps)
            do()
        return x.clone(), [lane.reasons for lane in dbcache.summary(adapter).lanes]

    expected, reasons = loop(one)
    assert "below threshold" in reasons[1]
    dbcache.refresh_context(adapter)
    graph = capture(FakeDriver(), one)
    got, told = loop(graph.replay)
    assert torch.equal(got, expected)
    assert told == reasons


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
    model = hunyuan_dit()
    adapter = BlockAdapter(
        transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_3
    )
    options = {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 3,
        "residual_diff_threshold": 0.1,
    } | last
    calls = []
    hook = model.blocks[-2].register_forward_pre_hook(lambda *_: calls.append(0))
    dbcache.enable(adapter, **options)
    expected, eager = denoise_hunyuan_dit(model), trace(model)
    hook.remove()
    dbcache.enable(adapter, **options, cuda_graph=mode)
    got = denoise_hunyuan_dit(model)
    assert trace(model) == eager
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    (reasons, _) = next(iter(eager.values()))
    cached = sum(Reason(code).cached for code in reasons)
    assert 5 < cached < STEPS - 3
    if last is LAST:
        assert STEPS - cached < len(calls) < STEPS, "left out on some of the cached steps"
    assert handle_of(model).graphs.replays == STEPS - 1


def test_host_mode_reads_only_what_the_plan_leaves_open(driver, monkeypatch):
    from dbcache.lane import Lane

    family, reads = FAMILIES["flux"], []
    read = Lane.read_decision
    monkeypatch.setattr(Lane, "read_decision", lambda lane: reads.append(lane.step) or read(lane))
    model = family.build()
    dbcache.enable(model, SETTINGS["static"], cuda_graph="host")
    denoise(model, family, 3)
    assert len(reads) == 2  # of the dynamic step that is tried, eager and replayed
    dbcache.refresh_context(model)
    reads.clear()
    denoise(model, family, STEPS)
    assert handle_of(model).graphs.replays == 3 - 1 + STEPS
    assert reads == []
    dbcache.enable(model, SETTINGS["reuse"], cuda_graph="host")
    denoise(model, family, 3)
    dbcache.refresh_context(model)
    reads.clear()
    denoise(model, family, 20)
    assert reads == list(range(5, 21))  # the count after steps 4 to 19


def test_device_mode_reads_nothing_and_launches_once_per_step(driver, monkeypatch):
    from dbcache.lane import Lane

    family = FAMILIES["flux"]
    model = family.build()
    dbcache.enable(model, SETTINGS["reuse"], cuda_graph="device")
    denoise(model, family, 3)

    def fail(lane):
        raise AssertionError("the host asked for a decision")

    monkeypatch.setattr(Lane, "read_decision", fail)
    dbcache.refresh_context(model, num_inference_steps=20)
    before = driver.launches
    denoise(model, family, 20)
    assert driver.launches == before + 20
    summary = dbcache.summary(model)
    assert summary.lanes[0].cached_steps, "the trace is read after the loop"
