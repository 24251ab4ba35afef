"""The predictor that ``enable(schedule=...)`` sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dbcache.config.options import option
from dbcache.config.predictors import FoCaCalibratorConfig
from dbcache.kernels.common.lane_state import MAX_SLOTS


@dataclass(kw_only=True)
class ScheduledCalibratorConfig(FoCaCalibratorConfig):
    """The weights of a schedule, and FoCa where it has none; `enable` sets it with a `schedule`."""

    by_forecaster: ClassVar[bool] = True
    window: ClassVar[str] = "snapshots"
    snapshots: int = option(4, low=3, high=MAX_SLOTS)
    """Ring slots per lane, 3 to 8."""

    def strify(self) -> str:
        return f"ScheduledK{self.snapshots}"
