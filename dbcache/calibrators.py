"""How the skipped residual is predicted: one config per method.

Names and defaults are cache-dit's, so that its users can switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dbcache.options import Options, check_choice, check_flag, check_int

HIGHEST_ORDER = 4


@dataclass(kw_only=True)
class CalibratorConfig(Options):
    """How the skipped residual is predicted. This base reuses the last one (order 0)."""

    enable_calibrator: bool = False
    """Predict `hidden_states`; False reuses the last residual."""

    enable_encoder_calibrator: bool = False
    """Predict `encoder_hidden_states`; False reuses the last residual."""

    calibrator_cache_type: Literal["residual", "hidden_states"] = "residual"
    """What is predicted: what the skipped blocks add, or what comes out of them."""

    def validate(self) -> None:
        who = type(self).__name__
        for name in ("enable_calibrator", "enable_encoder_calibrator"):
            check_flag(f"{who}.{name}", getattr(self, name))
        name = "calibrator_cache_type"
        check_choice(f"{who}.{name}", getattr(self, name), ("residual", "hidden_states"))

    @property
    def order(self) -> int:
        """Degree of the prediction; it needs ``order + 1`` snapshots."""
        return 0

    def strify(self) -> str:
        """Return a short name of these settings."""
        return "T0O0"


@dataclass(kw_only=True)
class TaylorSeerCalibratorConfig(CalibratorConfig):
    """Taylor series in the step number, by backward differences (TaylorSeer, arXiv:2503.06923)."""

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    taylorseer_order: int = 1
    """0 (reuse) to 4; the lane keeps ``order + 1`` snapshots."""

    def validate(self) -> None:
        super().validate()
        check_int(
            f"{type(self).__name__}.taylorseer_order", self.taylorseer_order, 0, HIGHEST_ORDER
        )

    @property
    def order(self) -> int:
        return self.taylorseer_order

    def strify(self) -> str:
        return f"T1O{self.taylorseer_order}" if self.taylorseer_order else "T0O0"
