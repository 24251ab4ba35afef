"""How the skipped residual is predicted: one config per method.

Names and defaults are cache-dit's, so that its users can switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dbcache.kernels.lane_state import Predictor
from dbcache.options import Options, check_choice, check_flag, check_int, check_number

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

    @property
    def predictor(self) -> Predictor:
        """How the weights follow from the steps of the snapshots."""
        return Predictor.TAYLOR

    @property
    def hermite_scale(self) -> float:
        """``2 * sigma**2`` of `Predictor.HERMITE`; 0 for the others."""
        return 0.0

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

    exact: bool = False
    """Predict with the polynomial through the snapshots (Newton's divided differences), whatever
    the distances between them. The series of TaylorSeer is exact for straight lines only."""

    def validate(self) -> None:
        super().validate()
        check_flag(f"{type(self).__name__}.exact", self.exact)
        check_int(
            f"{type(self).__name__}.taylorseer_order", self.taylorseer_order, 0, HIGHEST_ORDER
        )

    @property
    def order(self) -> int:
        return self.taylorseer_order

    @property
    def predictor(self) -> Predictor:
        return Predictor.NEWTON if self.exact else Predictor.TAYLOR

    def strify(self) -> str:
        name = f"T1O{self.taylorseer_order}" if self.taylorseer_order else "T0O0"
        return f"{name}E" if self.exact and self.taylorseer_order else name


@dataclass(kw_only=True)
class HermiteCalibratorConfig(CalibratorConfig):
    """Contracted Hermite polynomials in place of the powers of Taylor's series (HiCache).

    ``k**i`` becomes ``sigma**i * H_i(sigma * k)`` with H_i the physicists' Hermite polynomials.
    """

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    hermite_order: int = 1
    """0 (reuse) to 4; the lane keeps ``order + 1`` snapshots."""

    sigma: float = 0.5
    """Contraction, above 0 and at most 1: the first difference counts ``2 * sigma**2`` times."""

    def validate(self) -> None:
        super().validate()
        who = type(self).__name__
        check_int(f"{who}.hermite_order", self.hermite_order, 0, HIGHEST_ORDER)
        check_number(f"{who}.sigma", self.sigma, positive=True)
        if self.sigma > 1:
            raise ValueError(f"{who}.sigma must be at most 1, got {self.sigma!r}")

    @property
    def order(self) -> int:
        return self.hermite_order

    @property
    def predictor(self) -> Predictor:
        return Predictor.HERMITE

    @property
    def hermite_scale(self) -> float:
        return 2 * self.sigma**2

    def strify(self) -> str:
        return f"H1O{self.hermite_order}S{self.sigma:g}" if self.hermite_order else "T0O0"
