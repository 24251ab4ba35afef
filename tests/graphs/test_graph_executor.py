"""When the graph executor records, refuses, gives up, and what it leaves behind."""

import re

import inside
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from fake_driver import NODE, FakeDriver
from graph_runs import FLUX, OPTIONS, Step, graphs, one_stream, recordings, same, start
from tape import TapeRecorder, use_driver
from tiny import denoise, noise

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig, GraphOptions
from dbcache.adapters.requests.cached_transformer import handle_of
from dbcache.graphs.fingerprint import reason_against
from dbcache.kernels.common.lane_state import Reason

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return FLUX.build()


def eager(steps, *, batch=1, **options):
    model = FLUX.build()
    dbcache.enable(model, **OPTIONS | options)
    return denoise(model, FLUX, steps, batch=batch)


def test_off_unless_asked_for(model, driver):
    dbcache.enable(model, **OPTIONS)
    assert graphs(model) is None
    dbcache.enable(model, **OPTIONS, cuda_graph=True)
    assert graphs(model).options == GraphOptions(mode="auto")


@pytest.mark.parametrize("given", ["cuda", 2, None])
def test_refuses_unknown_modes(model, given):
    with pytest.raises((TypeError, ValueError), match=r"cuda_graph.*'auto', 'device', 'host'"):
        dbcache.enable(model, **OPTIONS, cuda_graph=given)
    assert handle_of(model) is None


def test_auto_takes_the_device_where_it_can(model, driver):
    dbcache.enable(model, **OPTIONS, cuda_graph="auto")
    assert same(denoise(model, FLUX, 8), eager(8))
    assert [r.replay.mode for r in recordings(model)] == ["device"]


def test_auto_steps_down_to_the_host_loudly(model, without_driver):
    dbcache.enable(model, **OPTIONS, cuda_graph="auto")
    with pytest.warns(UserWarning, match=r"'device' is impossible .* goes on with 'host': .*12040"):
        got = denoise(model, FLUX, 8)
    assert same(got, eager(8))
    assert [r.replay.mode for r in recordings(model)] == ["host"]
    assert any("12040" in note for note in dbcache.summary(model).notes)


def test_device_asked_for_by_name_does_not_step_down(model, without_driver):
    dbcache.enable(model, **OPTIONS, cuda_graph="device")
    with pytest.raises(RuntimeError, match=r"cuda_graph='device' is impossible here: .*12040"):
        denoise(model, FLUX, 8)
    dbcache.enable(model, **OPTIONS, cuda_graph="host")
    dbcache.refresh_context(model)
    assert same(denoise(model, FLUX, 8), eager(8))


def test_a_body_that_the_driver_refuses_falls_back_to_the_host(model, driver, monkeypatch):
    kinds = iter(["HOST"] * 2)
    close = TapeRecorder.end

    def end(self):
        tape = close(self)
        if tape.raw is not None:
            driver.graphs[tape.raw].nodes[0].kind = NODE[next(kinds, "KERNEL")]
        return tape

    monkeypatch.setattr(TapeRecorder, "end", end)
    dbcache.enable(model, **OPTIONS, cuda_graph=True)
    with pytest.warns(UserWarning, match="goes on with 'host': .*HOST nodes"):
        got = denoise(model, FLUX, 8)
    assert same(got, eager(8))


def test_a_failure_in_the_middle_of_recording_leaves_a_working_model(model, driver):
    dbcache.enable(model, **OPTIONS, num_inference_steps=8, cuda_graph=True)
    block, fails = model.transformer_blocks[2], [False]
    run = block.forward

    def forward(*args, **kwargs):
        if fails[0]:
            raise RuntimeError("out of memory")
        return run(*args, **kwargs)

    block.forward = forward
    x = start(1)
    with torch.no_grad():
        model(**FLUX.arguments(x, 1.0, "cond"))
        fails[0] = True
        with (
            pytest.warns(UserWarning, match="runs eagerly: out of memory"),
            pytest.raises(RuntimeError, match="out of memory"),
        ):
            model(**FLUX.arguments(x, 0.9, "cond"))
    fails[0] = False
    dbcache.refresh_context(model)
    assert same(denoise(model, FLUX, 8), eager(8))
    dbcache.disable(model)
    del block.forward
    assert "forward" not in model.__dict__
    assert not any(name in model.__dict__ for name in FLUX.lists)


def test_gradients_run_eagerly_and_say_so(model, driver):
    dbcache.enable(model, **OPTIONS, cuda_graph=True)
    x = start(1)
    with pytest.warns(UserWarning, match="gradients must be off"):
        model(**FLUX.arguments(x, 1.0, "cond"))
    assert not recordings(model)


def test_on_the_cpu_it_runs_eagerly_and_says_so(model):
    dbcache.enable(model, **OPTIONS, cuda_graph=True)
    with pytest.warns(UserWarning, match="must lie on one GPU, got cpu"):
        got = denoise(model, FLUX, 5)
    assert same(got, eager(5))
    assert any("(5 times)" in note for note in dbcache.summary(model).notes)
    dbcache.enable(model, **OPTIONS, cuda_graph="host")
    with pytest.raises(RuntimeError, match=r"cuda_graph='host' is impossible here: .*got cpu"):
        denoise(model, FLUX, 1)


def test_arguments_that_cannot_be_compared_run_eagerly_and_say_so(model, driver):
    dbcache.enable(model, **OPTIONS, cuda_graph=True)
    arguments = FLUX.arguments(start(1), 1.0, "cond") | {"joint_attention_kwargs": {"x": {1, 2}}}
    with torch.no_grad():
        with pytest.warns(UserWarning, match="must be hashable, got .*'set'"):
            model(**arguments)
        model(**arguments)
    assert not recordings(model)
    assert any("hashable" in n and "(2 times)" in n for n in dbcache.summary(model).notes)


def test_random_numbers_in_the_step_are_refused(model, driver):
    model.transformer_blocks[1].register_forward_hook(
        lambda module, args, output: (output[0] + 1e-3 * torch.randn(()), output[1])
    )
    dbcache.enable(model, **OPTIONS, cuda_graph=True)
    with pytest.warns(UserWarning, match="must not draw random numbers") as warned:
        denoise(model, FLUX, 5)
    assert len(warned) == 2  # one per mode, and none for the calls that follow
    assert not recordings(model)
    (device, host) = graphs(model).describe()
    assert re.fullmatch(r"cuda_graph: 'device' failed: .*random numbers.* \(1 times\)", device)
    assert re.fullmatch(r"cuda_graph: 'host' failed: .*random numbers.* \(4 times\)", host)


def test_each_dtype_of_autocast_has_its_own_recording(model, driver, monkeypatch):
    dbcache.enable(model, **OPTIONS, cuda_graph="host")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    for dtype, seen in ((torch.bfloat16, 1), (torch.float16, 2), (torch.bfloat16, 2)):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda _, dtype=dtype: dtype)
        denoise(model, FLUX, 3)
        assert len(recordings(model)) == seen


def test_control_flow_on_tensors_is_refused(model, driver):
    def hook(module, args, output):
        return (output[0] * (2 if output[0].sum().item() > 1e9 else 1), output[1])

    model.transformer_blocks[1].register_forward_hook(hook)
    dbcache.enable(model, **OPTIONS, cuda_graph=True)
    with pytest.warns(UserWarning, match="not permitted while capturing"):
        got = denoise(model, FLUX, 5)
    assert same(got, eager(5))


def test_what_the_inputs_do_not_show_is_found_before_the_recording_is_used(model, driver):
    calls = [0]

    def hook(module, args, output):
        calls[0] += 1
        return (output[0], output[1] * noise(*output[1].shape, seed=int(calls[0])))

    model.transformer_blocks[1].register_forward_hook(hook)
    dbcache.enable(model, **OPTIONS, cuda_graph="host")
    with pytest.raises(RuntimeError, match="depends on something that its inputs do not show"):
        denoise(model, FLUX, 5)


class Leaky(torch.nn.Module):
    """Its end uses what a middle block made: on a cached step that is from another step."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Step(seed) for seed in range(4))

    def forward(self, hidden_states):
        kept = []
        for block in self.blocks:
            hidden_states = block(hidden_states)
            kept.append(hidden_states.sin())
        return hidden_states + kept[2]


def test_values_that_leak_out_of_the_skipped_blocks_are_found(driver):
    model = Leaky()
    dbcache.enable(one_stream(model), **OPTIONS, cuda_graph="device")
    with torch.no_grad():
        model(noise(1, 5, 4, seed=0))
        with pytest.raises(RuntimeError, match="a replayed cached step must equal"):
            model(noise(1, 5, 4, seed=1))


def test_offloaded_models_are_refused(model, driver):
    class AlignDevicesHook:
        pass

    model.transformer_blocks[3]._hf_hook = AlignDevicesHook()
    dbcache.enable(model, **OPTIONS, cuda_graph="host")
    with pytest.raises(RuntimeError, match=r"transformer_blocks.3 .*has the hook AlignDevicesHook"):
        denoise(model, FLUX, 3)


def test_inductors_own_graphs_are_refused(model):
    model.transformer_blocks[2].compile(mode="max-autotune-no-cudagraphs")
    model.transformer_blocks[1] = torch.compile(model.transformer_blocks[1])
    assert reason_against(model) is None
    model.transformer_blocks[3].compile(mode="reduce-overhead")
    assert re.match(r"transformer_blocks.3 .*CUDA graphs of its own", reason_against(model))
    model.transformer_blocks[1] = torch.compile(torch.nn.Identity(), mode="max-autotune")
    assert re.match(r"transformer_blocks.1 .*CUDA graphs of its own", reason_against(model))


def test_new_shapes_are_new_recordings_and_old_ones_still_serve(model, driver):
    dbcache.enable(model, **OPTIONS, num_inference_steps=6, cuda_graph="device")
    batches = (1, 2, 1, 2, 1)
    for batch in batches:
        dbcache.refresh_context(model)
        got = denoise(model, FLUX, 6, batch=batch)
        assert same(got, eager(6, batch=batch))
    assert len(recordings(model)) == 2
    assert graphs(model).replays == 5 + 5 + 6 + 6 + 6


@pytest.mark.parametrize("config", [DBCacheConfig(), DBPruneConfig()], ids=["steps", "blocks"])
def test_shapes_that_take_turns_within_a_request_are_recorded_once_they_last(model, driver, config):
    x, reasons = start(1), []
    for mode in (False, "device"):
        dbcache.enable(model, config, **OPTIONS | {"max_warmup_steps": 1}, cuda_graph=mode)
        with torch.no_grad():
            for batch in (1, 2, 1, 2, 1, 1, 1, 2, 2, 2, 1):
                model(**FLUX.arguments(x.repeat(batch, 1, 1), 0.5, "cond"))
        reasons.append(dbcache.summary(model).lanes[0].reasons)
    assert reasons[0] == reasons[1]
    assert reasons[0].count("shape changed") == 6
    assert len(recordings(model)) == 2
    assert graphs(model).replays == 5


def test_each_context_of_inference_mode_is_entered_once(model, driver, monkeypatch):
    """A context that calls shared would restore the mode of another call, or thread."""
    entered, enter = [], torch.inference_mode.__enter__

    def seen(context):
        entered.append(context)  # held, so that no two have one address
        enter(context)

    monkeypatch.setattr(torch.inference_mode, "__enter__", seen)
    dbcache.enable(model, **OPTIONS, cuda_graph=True)
    for batch in (1, 2):
        denoise(model, FLUX, 6, batch=batch)
        dbcache.refresh_context(model)
    assert len(recordings(model)) == 2
    assert len(entered) > 10
    assert len({id(context) for context in entered}) == len(entered)


def test_other_arguments_are_part_of_the_kind(model, driver):
    dbcache.enable(model, **OPTIONS, cuda_graph="host")
    arguments = FLUX.arguments(start(1), 1.0, "cond")
    with torch.no_grad():
        for return_dict in (False, False, True, True):
            output = model(**arguments | {"return_dict": return_dict})
            assert isinstance(output, tuple) is not return_dict
    assert len(recordings(model)) == 2


def test_the_oldest_recordings_are_given_up_together(model, driver):
    dbcache.enable(model, **OPTIONS, cuda_graph=GraphOptions(mode="device", max_recordings=2))
    for batch in (1, 2, 3):
        dbcache.refresh_context(model)
        denoise(model, FLUX, 4, batch=batch)
    executor = graphs(model)
    assert len(recordings(model)) == 1
    assert executor.retired == 2
    assert len(driver.destroyed) == 4
    assert any("2 recordings were given up" in note for note in dbcache.summary(model).notes)


def test_memory_is_capped(model, driver, monkeypatch):
    monkeypatch.setattr(TapeRecorder, "nbytes", lambda self: 3_000_000_000)
    dbcache.enable(model, **OPTIONS, cuda_graph=GraphOptions(max_gigabytes=2.0))
    for batch in (1, 2):
        dbcache.refresh_context(model)
        denoise(model, FLUX, 4, batch=batch)
    assert graphs(model).retired == 1


def test_numbers_change_without_a_new_recording(model, driver):
    dbcache.enable(model, **OPTIONS, num_inference_steps=8, cuda_graph="device")
    denoise(model, FLUX, 8)
    recorded = recordings(model)
    for changes in (
        {"residual_diff_threshold": 0.05},
        {"max_cached_steps": 2},
        {"steps_computation_mask": [1, 1, 0, 0, 1, 0, 0, 1]},
    ):
        dbcache.refresh_context(model, **changes)
        got = denoise(model, FLUX, 8)
        assert recordings(model) == recorded
        fresh = FLUX.build()
        dbcache.enable(fresh, inside.handle(model).setup.config)
        assert same(got, denoise(fresh, FLUX, 8))
    assert graphs(model).replays == 7 + 3 * 8


def test_other_blocks_to_run_are_a_new_recording(model, driver):
    dbcache.enable(model, **OPTIONS, num_inference_steps=6, cuda_graph="device")
    denoise(model, FLUX, 6)
    dbcache.refresh_context(model, Fn_compute_blocks=3)
    assert not recordings(model)
    assert same(denoise(model, FLUX, 6), eager(6, Fn_compute_blocks=3))


def test_weights_that_change_in_place_are_read_anew(model, driver):
    dbcache.enable(model, **OPTIONS, num_inference_steps=6, cuda_graph="device")
    denoise(model, FLUX, 6)
    with torch.no_grad():
        model.x_embedder.weight.mul_(0.5)
    got = denoise(model, FLUX, 6)
    assert graphs(model).retired == 0
    dbcache.enable(model, **OPTIONS, num_inference_steps=6)
    assert same(got, denoise(model, FLUX, 6))


@pytest.mark.parametrize("change", ["weight", "adapter", "processor", "scale", "backend", "hook"])
def test_weights_elsewhere_and_other_settings_are_a_new_recording(model, driver, change):
    dbcache.enable(model, **OPTIONS, num_inference_steps=6, cuda_graph="device")
    denoise(model, FLUX, 6)
    block = model.transformer_blocks[2]
    if change == "weight":
        block.norm1.linear.weight = torch.nn.Parameter(block.norm1.linear.weight * 0.5)
    elif change == "adapter":
        block.ff.net[0].scaling = {"style": 0.5}
    elif change == "processor":
        block.attn.processor = type(block.attn.processor)()
    elif change == "scale":  # as `set_ip_adapter_scale` does
        block.attn.processor.scale = [0.5]
    elif change == "backend":  # as `set_attention_backend` does
        block.attn.processor._attention_backend = AttentionBackendName.NATIVE
    else:
        block.register_forward_hook(lambda module, args, output: (output[0] * 0.5, output[1]))
    got = denoise(model, FLUX, 6)
    assert graphs(model).retired == 1
    assert graphs(model).replays == 5 + 5
    dbcache.enable(model, **OPTIONS, num_inference_steps=6)
    assert same(got, denoise(model, FLUX, 6))


def test_outputs_are_the_users_unless_asked_otherwise(model, driver):
    x = start(1)
    for static in (False, True):
        dbcache.enable(
            model, **OPTIONS, cuda_graph=GraphOptions(mode="host", static_outputs=static)
        )
        with torch.no_grad():
            outputs = [model(**FLUX.arguments(x * k, 1.0, "cond"))[0] for k in (1, 2, 3, 4)]
        assert (outputs[2].data_ptr() == outputs[3].data_ptr()) is static
        assert torch.equal(outputs[2], outputs[3]) is static


def test_a_failed_launch_counts_as_never_begun(model, driver, monkeypatch):
    dbcache.enable(model, **OPTIONS, num_inference_steps=8, cuda_graph="device")
    denoise(model, FLUX, 3)
    lane = inside.stacks(model)[0].lanes[None]

    def fail(*_):
        raise RuntimeError("lost the GPU")

    x = start(1)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(FakeDriver, "do_cuGraphLaunch", fail)
        with pytest.raises(RuntimeError, match="lost the GPU"):
            model(**FLUX.arguments(x, 0.5, "cond"))
    assert lane.steps.step == 3
    assert not lane.steps.has_reference
    with torch.no_grad():
        model(**FLUX.arguments(x, 0.5, "cond"))
    assert Reason(lane.steps.snapshot()()[0][-1]) == Reason.NO_REFERENCE


def test_a_cpu_machine_can_import_all_of_it(monkeypatch):
    from dbcache.graphs.cuda_driver import find_driver

    driver, why = find_driver()
    assert driver is None
    assert why
    use_driver(monkeypatch, FakeDriver())
