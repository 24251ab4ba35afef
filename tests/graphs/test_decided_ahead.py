"""Steps without a probe, recorded: what the plan says needs no measurement."""

import pytest
import torch
from policy_engines import calibration
from tiny import FAMILIES, denoise

import dbcache
from dbcache.adapters.cached_transformer import handle_of

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 24
MASK = [1, 1, 1, 0, 0, 1, 0, 0] * 3


@pytest.mark.parametrize("mode", ["host", "device"])
@pytest.mark.parametrize("policy", ["dbcache", "magcache"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_steps_decided_ahead_are_the_same_bit_for_bit(driver, name, policy, mode):
    family = FAMILIES[name]
    settings = {
        "dbcache": {
            "steps_computation_mask": MASK,
            "steps_computation_policy": "static",
            "static_skip_probe": True,
        },
        "magcache": {"max_warmup_steps": 3, "residual_diff_threshold": 0.1},
    }[policy]
    if policy == "magcache":
        settings |= {"policy": policy, "calibration": calibration(name, policy)}
    runs = []
    for how in ({}, {"cuda_graph": mode}):
        model = dbcache.enable(family.build(), enable_separate_cfg=False, **settings, **how)
        outputs = denoise(model, family, STEPS)
        (lane,) = dbcache.summary(model).lanes
        runs.append((outputs, lane.reasons, lane.diffs))
    assert handle_of(model).graphs.recordings
    assert not handle_of(model).graphs.reasons
    (eager, *decided), (recorded, *same) = runs
    assert decided == same
    assert any(reason in ("static", "below threshold") for reason in decided[0])
    assert all(map(torch.equal, eager, recorded))
