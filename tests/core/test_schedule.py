"""Plans: what is fixed before the loop starts."""

import pytest

from dbcache import DBCacheConfig
from dbcache.schedule import make_plan

LETTERS = {0: "d", 1: "s", 2: "W", 3: "M"}  # dynamic, static, warm-up, mask


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({"max_warmup_steps": 0}, "dddddddd"),
        ({"max_warmup_steps": 3}, "WWWddddd"),
        ({"max_warmup_steps": 6, "warmup_interval": 2}, "WdWdWddd"),
        ({"max_warmup_steps": 6, "steps_computation_mask": [1, 1, 0, 0, 1, 0]}, "WWddMddd"),
        (
            {"steps_computation_mask": [1, 0, 0, 1], "steps_computation_policy": "static"},
            "WssMssss",
        ),
        ({"max_warmup_steps": 1, "steps_computation_mask": [1, 1, 1, 0]}, "WMMddddd"),
        (
            {"max_warmup_steps": 4, "warmup_interval": 3, "steps_computation_mask": [1] * 8},
            "WMMWMMMM",
        ),
    ],
)
def test_plan_follows_warmup_then_mask(options, plan):
    assert "".join(LETTERS[code] for code in make_plan(DBCacheConfig(**options), 8)) == plan
