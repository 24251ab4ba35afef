"""Who decides a step: the probe's change, or a signal that needs no block (`DBCacheConfig.policy`).

    dbcache     change of the probe residual            github.com/chengzeyi/ParaAttention (FBCache)
    easycache   movement of the latents times a rate    arXiv:2507.02860
    teacache    polynomial of the first block's input   arXiv:2411.19108
    seacache    change of the latents, filtered         arXiv:2602.18993
    magcache    ratios of a calibration run             arXiv:2506.09045
    schedule    a mask per guidance branch              `dbcache.tune`
    guarded_schedule    the same, where the latents move as they did when it was made

All but the first decide before the first block: a cached step then runs none but the last Bn, and
the residual that is kept and predicted spans all others. They add up what each step contributes
since the last full one and compare the sum with `residual_diff_threshold`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dbcache.kernels.common.lane_state import Signal


@dataclass(frozen=True)
class Policy:
    """One policy.

    Attributes:
        label: how it is written in names and tables.
        measures: what is measured; nothing if it is "calibration".
        signal: how the measurement decides.
        refuses: options, by name, that have no meaning here, and why.
    """

    label: str
    measures: Literal["probe", "latents", "modulated", "spectrum", "calibration"]
    signal: Signal
    refuses: dict[str, str]


_NO_PROBE = {
    "l1_hidden_states_diff_threshold": "no probe block runs whose output could be compared",
    "important_condition_threshold": "no tokens of a probe are compared",
}
_ONE_RATE = {"batch_reduce": "the rate is that of the batch as a whole"}
_NOTHING = {
    "batch_reduce": "nothing is measured",
    "cfg_diff_compute_separate": "nothing is measured",
}

POLICIES = {
    "dbcache": Policy("DBCache", "probe", Signal.CHANGE, {}),
    "easycache": Policy("EasyCache", "latents", Signal.RATE, _NO_PROBE | _ONE_RATE),
    "teacache": Policy("TeaCache", "modulated", Signal.SUM, _NO_PROBE),
    "seacache": Policy("SeaCache", "spectrum", Signal.SUM, _NO_PROBE),
    "magcache": Policy("MagCache", "calibration", Signal.SUM, _NO_PROBE | _NOTHING),
    "schedule": Policy("Schedule", "calibration", Signal.SUM, _NO_PROBE | _NOTHING),
    "guarded_schedule": Policy("GuardedSchedule", "latents", Signal.RATE, _NO_PROBE | _ONE_RATE),
}
CALIBRATED = ("teacache", "magcache")
"""Policies that `dbcache.calibrate` prepares."""
SCHEDULED = ("schedule", "guarded_schedule")
"""Policies that ``enable(schedule=...)`` sets."""
