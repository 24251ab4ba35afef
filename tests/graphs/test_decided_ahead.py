"""Steps without a probe, recorded: what the plan says needs no measurement."""

import pytest
from graph_runs import MODES, both, recordings
from policy_engines import calibration
from tiny import FAMILIES, denoise

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 24
MASK = [1, 1, 1, 0, 0, 1, 0, 0] * 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["dbcache", "magcache"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_steps_decided_ahead_are_the_same_bit_for_bit(driver, known, name, policy, mode):
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
    model, ((_, _, reasons, *_),) = both(
        lambda m: denoise(m, family, STEPS),
        family.build,
        **settings,
        enable_separate_cfg=False,
        mode=mode,
        known=known[name, policy],
    )
    assert recordings(model)
    assert any(reason in ("static", "below threshold") for reason in reasons)
