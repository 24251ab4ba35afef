"""Whole pipelines whose guidance and ControlNets come and go, recorded: lanes as without graphs."""

import pipelines
import pytest
import torch
from pipelines import decisions

import dbcache

CASES = {
    "FLUX.1 ControlNet": {"control_guidance_end": 0.5},
    "Lumina 2": {"cfg_trunc_ratio": 0.5},
    "Stable Diffusion 3": {"skip_guidance_layers": [3, 4], "skip_layer_guidance_stop": 0.9},
    "Stable Diffusion 3 without its last block": {
        "skip_guidance_layers": [9],
        "skip_layer_guidance_stop": 0.9,
    },
}
FORCED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels", "driver")


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_have_the_lanes_of_eager_ones(case):
    name, options = case.split(" without")[0], {"guided": True, "steps": 8, **CASES[case]}
    pipe = dbcache.enable(pipelines.build(name), **FORCED)
    expected = pipelines.draw(pipe, name, **options)
    lanes = decisions(pipe)
    dbcache.enable(pipe, **FORCED, cuda_graph="device")
    for _ in range(2):
        drawn = pipelines.draw(pipe, name, **options)
        assert decisions(pipe) == lanes
        torch.testing.assert_close(drawn, expected)
    assert "steps replayed" in "".join(dbcache.summary(pipe).notes)
    dbcache.disable(pipe)
