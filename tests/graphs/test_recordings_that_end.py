"""When recordings end: with the cache, with the room of a lane, with what they were made for."""

import inside
import pytest
import torch
from fake_driver import FakeDriver
from graph_runs import FLUX, MODES, OPTIONS, Step, both, graphs, one_stream, recordings, start
from tiny import denoise, noise

import dbcache
from dbcache.graphs import graph

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("how", ["disabled", "enabled again", "rebuilt", "renumbered"])
def test_the_driver_gets_its_graphs_back_with_the_cache(driver, how):
    model = FLUX.build()
    dbcache.enable(model, **OPTIONS, num_inference_steps=4, cuda_graph="device")
    denoise(model, FLUX, 4)
    executor = graphs(model)
    assert len(executor.recordings) == 1
    if how == "disabled":
        dbcache.disable(model)
    elif how == "enabled again":
        dbcache.enable(model, **OPTIONS)
    elif how == "rebuilt":
        dbcache.refresh_context(model, Fn_compute_blocks=2)
    else:
        dbcache.refresh_context(model, residual_diff_threshold=0.1)
    kept = how == "renumbered"
    assert len(driver.destroyed) == (0 if kept else 2)  # a graph, and what was made of it
    assert len(executor.recordings) == kept


@pytest.mark.parametrize("mode", MODES)
def test_requests_longer_than_the_room_of_a_lane_are_recorded_anew(driver, monkeypatch, mode):
    monkeypatch.setattr(graph, "CAPACITY", 64)
    model, _ = both(lambda m: denoise(m, FLUX, 70), FLUX.build, **OPTIONS, mode=mode)
    assert graphs(model).retired == len(recordings(model)) == 1
    assert graphs(model).replays == 63 + 5  # steps 0 and 64 ran eagerly


class Two(torch.nn.Module):
    """Two stacks, the second of which gets more tokens: its shapes may change alone."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.ModuleList(Step(seed) for seed in range(4))
        self.second = torch.nn.ModuleList(Step(seed) for seed in range(4, 8))

    def forward(self, hidden_states, more):
        for block in self.first:
            hidden_states = block(hidden_states)
        hidden_states = torch.cat([hidden_states, more], 1)
        for block in self.second:
            hidden_states = block(hidden_states)
        return hidden_states


@pytest.mark.parametrize("mode", MODES)
def test_a_stack_whose_shapes_change_alone_makes_the_step_a_full_one(driver, mode):
    """A recorded step with other shapes than the last, on a plan that would cache it."""
    model = Two()
    adapter = one_stream(model, "first", "second")
    static = {
        "steps_computation_mask": [1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0],
        "steps_computation_policy": "static",
        "max_warmup_steps": 1,
        "decision_scope": "model",
    }
    dbcache.enable(adapter, **OPTIONS | static, cuda_graph=mode)
    errors = []
    with torch.no_grad():
        for step, length in enumerate((2, 2, 2, 2, 2, 3, 3, 3, 3, 2, 2, 3)):
            x, more = noise(1, 5, 4, seed=step), noise(1, length, 4, seed=100 + step)
            output, plain = model(x, more), Two.forward(model, x, more)
            errors.append(float((output - plain).abs().max()))
    assert graphs(model).replays == 12 - 2
    assert [step for step, error in enumerate(errors) if error > 1e-6] == [4, 8, 10]
    first, second = dbcache.summary(adapter).lanes
    assert first.reasons[9] == first.reasons[11] == "shape changed"
    assert second.reasons == first.reasons


@torch.no_grad()
def test_a_stack_whose_shapes_changed_alone_is_not_captured_to_serve_all_steps(capture):
    model, fake, x = Two(), FakeDriver(), noise(1, 5, 4, seed=1)
    adapter = one_stream(model, "first", "second")
    dbcache.enable(adapter, **OPTIONS, decision_scope="model")
    short, long = noise(1, 2, 4, seed=2), noise(1, 3, 4, seed=3)
    model(x, short)
    model(x, long)
    dbcache.refresh_context(adapter)
    with pytest.raises(RuntimeError, match="second: a step that is captured to serve all steps"):
        capture(fake, lambda: model(x, short))
    capture(fake, lambda: model(x, long))


def test_a_lane_has_room_for_a_usual_request_from_its_first_recording_on(driver):
    model = FLUX.build()
    dbcache.enable(model, **OPTIONS, cuda_graph="device")
    denoise(model, FLUX, 70)  # more than a lane that is not recorded has room for at first
    executor = graphs(model)
    assert (executor.retired, executor.replays) == (0, 69)


@pytest.mark.parametrize("mode", MODES)
def test_a_lane_that_grew_in_a_step_of_another_kind_is_recorded_anew(driver, monkeypatch, mode):
    monkeypatch.setattr(graph, "CAPACITY", 64)

    @torch.no_grad()
    def run(model):
        x, outputs = start(1), []
        for step in range(70):
            # step 64 runs eagerly, as the first of its kind, and makes room
            inputs = FLUX.arguments(x, 1.0 - step / 70, "cond") | {"return_dict": step == 64}
            outputs.append(model(**inputs)[0])
            x = x - outputs[-1] / 70
        return outputs

    model, _ = both(run, FLUX.build, **OPTIONS, mode=mode)
    assert (graphs(model).retired, graphs(model).replays) == (1, 63 + 4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("knows", [True, False], ids=["a reference", "no reference"])
def test_recording_leaves_a_lane_as_it_was(driver, monkeypatch, knows, mode):
    """Its trials and the capture count for nothing."""
    held, record = [], graph.GraphExecutor._record

    def content(lane):
        steps = lane.steps
        # the plan and the traces have grown
        tensors = {i: x[:64].clone() for i, x in enumerate(lane.tensors()) if x is not None}
        host = [getattr(steps, name) for name in steps.HOST if name != "plan"]
        return [*host, lane.layout], steps.plan[:64], tensors

    def watched(executor, *how):
        (lane,) = inside.request(model).lanes()
        held.append(content(lane))
        recording = record(executor, *how)
        held.append(content(lane))
        return recording

    monkeypatch.setattr(graph.GraphExecutor, "_record", watched)
    model = FLUX.build()
    dbcache.enable(model, **OPTIONS, enable_taylorseer=True, num_inference_steps=8, cuda_graph=mode)
    (stack,) = inside.stacks(model)
    x = start(1)
    with torch.no_grad():
        model(**FLUX.arguments(x, 1.0, "cond"))
        if not knows:
            stack.lanes[None].forget_reference()
        model(**FLUX.arguments(0.9 * x, 0.9, "cond"))
    (host, plan, tensors), (same_host, same_plan, same_tensors) = held
    assert host == same_host
    assert host[1] is knows
    assert plan == same_plan
    assert tensors.keys() == same_tensors.keys()
    for name, tensor in tensors.items():
        # by bytes: what was never written may be NaN
        assert tensor.numpy().tobytes() == same_tensors[name].numpy().tobytes(), name


@pytest.mark.parametrize("mode", MODES)
def test_eager_steps_know_the_reference_that_a_replayed_one_left(driver, mode):
    @torch.no_grad()
    def run(model):
        (stack,) = inside.stacks(model)
        outputs = []
        for step in range(8):
            if step == 4:
                stack.lanes[None].forget_reference()
            inputs = FLUX.arguments(start(1), 1.0 - step / 8, "cond") | {"return_dict": step == 6}
            outputs.append(model(**inputs)[0])
        return outputs

    always = OPTIONS | {"max_warmup_steps": 1, "residual_diff_threshold": 1.0}
    _, ((_, _, reasons, *_),) = both(run, FLUX.build, **always, mode=mode)
    assert "reference" in reasons[4]
    assert len(set(reasons[5:])) == 1
