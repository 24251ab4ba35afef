"""`dbcache.capture`: recordings before the first request, of all that a request calls."""

import re

import inside
import pytest
import torch
from graph_runs import FLUX, OPTIONS, graphs, same, start
from tiny import BRANCHES, FAMILIES, denoise, generate, noise, pipeline

import dbcache
from dbcache import BlockAdapter
from dbcache.kernels.common.lane_state import Reason

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return FLUX.build()


def eager(steps, **options):
    model = FLUX.build()
    dbcache.enable(model, **OPTIONS | options)
    return denoise(model, FLUX, steps)


def test_capture_records_ahead_of_the_first_request(model, driver):
    dbcache.enable(model, **OPTIONS, num_inference_steps=8, cuda_graph="device")
    x = start(1)
    (recording,) = dbcache.capture(model, **FLUX.arguments(x, 1.0, "cond"))
    assert re.fullmatch(r"device, 1x16x16 float32", recording.name)
    assert recording.seconds > 0
    before = graphs(model).replays
    assert same(denoise(model, FLUX, 8), eager(8))
    assert graphs(model).replays == before + 8
    assert inside.stacks(model)[0].lanes[None].steps.snapshot()()[0][0] == Reason.WARMUP


def test_capture_needs_graphs(model, driver):
    with pytest.raises(RuntimeError, match="must be enabled on it first"):
        dbcache.capture(model)
    dbcache.enable(model, **OPTIONS)
    with pytest.raises(RuntimeError, match="cuda_graph=True"):
        dbcache.capture(model)


def test_branches_in_turn_are_all_recorded(driver):
    family = FAMILIES["qwen"]
    model = dbcache.enable(family.build(), **OPTIONS, num_inference_steps=8, cuda_graph="device")
    x = noise(*family.latent_shape, seed=1)
    recorded = dbcache.capture(model, **family.arguments(x, 1.0, "cond"))
    assert [recording.name.split(", ")[2] for recording in recorded] == list(BRANCHES)
    before = graphs(model).replays
    denoise(model, family, 8, branches=BRANCHES)
    assert graphs(model).replays == before + 16


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, scale, state):
        return (state + scale * self.linear(state).tanh(), None)


class Untold(torch.nn.Module):
    """Of its blocks only a forward tells which argument is the stream."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(Block() for _ in range(5))

    def forward(self, x):
        for part in self.parts:
            x = part(torch.ones(1), x)[0]
        return x


def test_a_first_forward_that_only_learns_is_no_obstacle(driver):
    model = Untold()
    dbcache.enable(BlockAdapter(transformer=model, auto=True), **OPTIONS, cuda_graph="host")
    assert not inside.stacks(model)
    (recording,) = dbcache.capture(model, x=noise(1, 5, 4, seed=1))
    assert recording.name == "host, 1x5x4 float32"


@pytest.mark.parametrize(("name", "transformers"), [("wan2.2", 2), ("flux", 1)])
def test_pipelines_of_several_transformers_and_guidance_of_two_calls(driver, name, transformers):
    pipe = dbcache.enable(pipeline(name), **OPTIONS, cuda_graph="device")
    recorded = []
    with pytest.MonkeyPatch.context() as patch:
        request = type(pipe).__call__
        patch.setattr(type(pipe), "__call__", lambda *args, **how: recorded.append((args, how)))
        generate(pipe, 2)  # only tells what it calls the pipeline with
        patch.setattr(type(pipe), "__call__", request)
    ((_, inputs),) = recorded
    assert len(dbcache.capture(pipe, **inputs)) == 2 * transformers
    parts = [pipe.transformer, *filter(None, [getattr(pipe, "transformer_2", None)])]
    before = sum(graphs(part).replays for part in parts)
    generate(pipe, 8)
    assert sum(graphs(part).replays for part in parts) == before + 16
