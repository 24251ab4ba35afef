"""How the skipped residual is predicted: one config per method.

Names and defaults are cache-dit's, so that its users can switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dbcache.config.options import Options, check_choice, check_flag, check_int, check_number
from dbcache.config.predictor_registry import registered
from dbcache.kernels.common.lane_state import MAX_SLOTS, Predictor

HIGHEST_ORDER = 4


@dataclass(kw_only=True)
class CalibratorConfig(Options):
    """How the skipped residual is predicted. This base reuses the last one (order 0)."""

    has_forecaster: ClassVar[bool] = False
    """Whether its weights come from `forecasters`, and not from `decide`."""

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
        """Degree of the series that `decide` computes; it needs ``order + 1`` snapshots."""
        return 0

    @property
    def slots(self) -> int:
        """Snapshots that the prediction is made of, at most."""
        return self.order + 1

    @property
    def predictor(self) -> Predictor:
        """How the weights follow from the steps of the snapshots."""
        return Predictor.TAYLOR

    @property
    def scale(self) -> float:
        """What `kernels.taylor` calls so; 0 where the predictor has none."""
        return 0.0

    @property
    def recorded(self) -> str:
        """What recorded work depends on: "" where `decide` computes the weights."""
        if not self.has_forecaster:
            return ""
        return f"{self.strify()} {self.enable_calibrator} {self.enable_encoder_calibrator}"

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
    def scale(self) -> float:
        return 2 * self.sigma**2

    def strify(self) -> str:
        return f"H1O{self.hermite_order}S{self.sigma:g}" if self.hermite_order else "T0O0"


@dataclass(kw_only=True)
class FoCaCalibratorConfig(CalibratorConfig):
    """The slope of the parabola through three snapshots, as far as it holds (after FoCa).

    That slope is BDF2's with the distances between full steps that there are; cache-dit's FoCa
    takes them all to be 1. Beyond `foca_horizon` gaps the slope of the last gap goes on.
    Source: arXiv:2508.16211; what bounds the forecast is this project's.
    """

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    foca_horizon: float = 0.5
    """How far the parabola's slope holds, in gaps between the two newest full steps, above 0."""

    def validate(self) -> None:
        super().validate()
        who = type(self).__name__
        check_number(f"{who}.foca_horizon", self.foca_horizon, positive=True)

    @property
    def order(self) -> int:
        return 2

    @property
    def predictor(self) -> Predictor:
        return Predictor.FOCA

    @property
    def scale(self) -> float:
        return self.foca_horizon

    def strify(self) -> str:
        return "FoCa" if self.foca_horizon == 0.5 else f"FoCaH{self.foca_horizon:g}"


@dataclass(kw_only=True)
class DMDCalibratorConfig(CalibratorConfig):
    """Linear prediction: the snapshots are taken for sums of two exponentials.

    What dynamic mode decomposition of rank 2 computes, from a few sums over the ring at each full
    step instead of an SVD (`kernels.fit_recurrence`). Where the newest three full steps are not
    equally far apart, a straight line, as TaylorSeer of order 1. Needs a ring that is not fp8.
    """

    has_forecaster = True
    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    dmd_history: int = 4
    """Snapshots that are fitted, 3 to 8; the lane keeps as many."""

    dmd_ridge: float = 1.0
    """Pull towards straight lines, above 0; 1 goes about half the way. What is small (1e-6) follows
    exponentials exactly, and is misled by what changes at random."""

    dmd_rank: int = 0
    """0 or 2, which are the same: there are two exponentials."""

    dmd_svd_precision: Literal["low", "medium", "high"] = "medium"
    """As cache-dit has it; there is no SVD here, all three are the same."""

    def validate(self) -> None:
        super().validate()
        who = type(self).__name__
        check_int(f"{who}.dmd_history", self.dmd_history, 3, MAX_SLOTS)
        check_number(f"{who}.dmd_ridge", self.dmd_ridge, positive=True)
        if self.dmd_rank not in (0, 2):
            raise ValueError(f"{who}.dmd_rank must be 0 or 2, got {self.dmd_rank!r}")
        allowed = ("low", "medium", "high")
        check_choice(f"{who}.dmd_svd_precision", self.dmd_svd_precision, allowed)

    @property
    def order(self) -> int:
        return 1

    @property
    def slots(self) -> int:
        return self.dmd_history

    def strify(self) -> str:
        ridge = "" if self.dmd_ridge == 1 else f"R{self.dmd_ridge:g}"
        return f"DMDH{self.dmd_history}{ridge}"


@dataclass(kw_only=True)
class SpectrumCalibratorConfig(CalibratorConfig):
    """A ridge regression on Chebyshev polynomials of the step, blended with a straight line.

    Source: Spectrum, arXiv:2603.01623, which fits all full steps of the request with a ridge of
    0.1; here they are the newest `spectrum_window`, for which that pulls the prediction towards 0.
    The steps of the request must be known: from the pipeline's call or `num_inference_steps`.
    """

    has_forecaster = True
    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    spectrum_order: int = 4
    """Highest degree of the polynomials, 1 to 4."""

    spectrum_window: int = 8
    """Snapshots that are fitted, 2 to 8; the lane keeps as many."""

    spectrum_ridge: float = 1e-4
    """Added to the diagonal of the normal equations, above 0."""

    spectrum_blend: float = 0.5
    """Parts of the regression, 0 to 1; the rest is the line through the two newest snapshots."""

    def validate(self) -> None:
        super().validate()
        who = type(self).__name__
        check_int(f"{who}.spectrum_order", self.spectrum_order, 1, HIGHEST_ORDER)
        check_int(f"{who}.spectrum_window", self.spectrum_window, 2, MAX_SLOTS)
        check_number(f"{who}.spectrum_ridge", self.spectrum_ridge, positive=True)
        check_number(f"{who}.spectrum_blend", self.spectrum_blend)
        if self.spectrum_blend > 1:
            raise ValueError(f"{who}.spectrum_blend must be at most 1, got {self.spectrum_blend!r}")

    @property
    def order(self) -> int:
        return 1

    @property
    def slots(self) -> int:
        return self.spectrum_window

    def strify(self) -> str:
        return (
            f"SpectrumO{self.spectrum_order}W{self.spectrum_window}"
            f"R{self.spectrum_ridge:g}B{self.spectrum_blend:g}"
        )


@dataclass(kw_only=True)
class CustomCalibratorConfig(CalibratorConfig):
    """A predictor of your own, by the name under which `register_predictor` knows it."""

    has_forecaster = True
    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    predictor_name: str
    """What was registered."""

    def validate(self) -> None:
        super().validate()
        registered(self.predictor_name)

    @property
    def order(self) -> int:
        return 1

    @property
    def slots(self) -> int:
        return registered(self.predictor_name).snapshots

    def strify(self) -> str:
        return f"Custom_{self.predictor_name}"
