"""How the skipped residual is predicted: one config per method.

Names and defaults are cache-dit's, so that its users can switch.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import ClassVar, Literal

from dbcache.config.options import Options, option
from dbcache.config.predictor_registry import registered
from dbcache.kernels.common.lane_state import MAX_SLOTS, Predictor

HIGHEST_ORDER = 4


@dataclass(kw_only=True)
class CalibratorConfig(Options):
    """How the skipped residual is predicted. This base reuses the last one (order 0)."""

    by_forecaster: ClassVar[bool] = False
    """Whether its weights come from `lanes.predictors`, and not from `decide`."""

    series: ClassVar[int | str] = 0
    """Degree of the series that `decide` computes, or the field that says so."""

    enable_calibrator: bool = False
    """Predict `hidden_states`; False reuses the last residual."""

    enable_encoder_calibrator: bool = False
    """Predict `encoder_hidden_states`; False reuses the last residual."""

    calibrator_cache_type: Literal["residual", "hidden_states"] = "residual"
    """What is predicted: what the skipped blocks add, or what comes out of them."""

    @property
    def order(self) -> int:
        """Degree of the series that `decide` computes; it needs ``order + 1`` snapshots."""
        return getattr(self, self.series) if isinstance(self.series, str) else self.series

    window: ClassVar[str] = ""
    """The field that says how many snapshots the prediction is made of; "": the order does."""

    @property
    def slots(self) -> int:
        """Snapshots that the prediction is made of, at most."""
        return getattr(self, self.window) if self.window else self.order + 1

    rule: ClassVar[Predictor] = Predictor.TAYLOR
    """How the weights follow from the steps of the snapshots."""

    @property
    def kind(self) -> Predictor:
        """The rule, where fields choose among several."""
        return self.rule

    @property
    def scale(self) -> float:
        """The predictor's parameter in `kernels.prediction.taylor`; 0 where there is none."""
        return 0.0

    def strify(self) -> str:
        """Return a short name of these settings."""
        return "T0O0"


@dataclass(kw_only=True)
class SwitchedOn(CalibratorConfig):
    """A predictor that takes both streams unless it is told otherwise."""

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True


@dataclass(kw_only=True)
class TaylorSeerCalibratorConfig(SwitchedOn):
    """Taylor series in the step number, by backward differences (TaylorSeer, arXiv:2503.06923)."""

    series: ClassVar[int | str] = "taylorseer_order"
    taylorseer_order: int = option(1, high=HIGHEST_ORDER)
    """0 (reuse) to 4; the lane keeps ``order + 1`` snapshots."""

    exact: bool = option(False, flat="taylorseer_exact")
    """Predict with the polynomial through the snapshots (Newton's divided differences), whatever
    the distances between them. The series of TaylorSeer is exact for straight lines only."""

    @property
    def kind(self) -> Predictor:
        return Predictor.NEWTON if self.exact else Predictor.TAYLOR

    def strify(self) -> str:
        name = f"T1O{self.taylorseer_order}" if self.taylorseer_order else "T0O0"
        return f"{name}E" if self.exact and self.taylorseer_order else name


@dataclass(kw_only=True)
class HermiteCalibratorConfig(SwitchedOn):
    """Contracted Hermite polynomials in place of the powers of Taylor's series (HiCache).

    ``k**i`` becomes ``sigma**i * H_i(sigma * k)`` with H_i the physicists' Hermite polynomials.
    """

    rule: ClassVar[Predictor] = Predictor.HERMITE
    series: ClassVar[int | str] = "hermite_order"
    hermite_order: int = option(1, high=HIGHEST_ORDER)
    """0 (reuse) to 4; the lane keeps ``order + 1`` snapshots."""

    sigma: float = option(0.5, high=1, positive=True, flat="hermite_sigma")
    """Contraction, above 0 and at most 1: the first difference counts ``2 * sigma**2`` times."""

    @property
    def scale(self) -> float:
        return 2 * self.sigma**2

    def strify(self) -> str:
        return f"H1O{self.hermite_order}S{self.sigma:g}" if self.hermite_order else "T0O0"


@dataclass(kw_only=True)
class FoCaCalibratorConfig(SwitchedOn):
    """The slope of the parabola through three snapshots, as far as it holds (after FoCa).

    That slope is BDF2's with the distances between full steps that there are; cache-dit's FoCa
    takes them all to be 1. Beyond `foca_horizon` gaps the slope of the last gap goes on.
    Source: arXiv:2508.16211; what bounds the forecast is this project's.
    """

    rule: ClassVar[Predictor] = Predictor.FOCA
    series: ClassVar[int | str] = 2
    foca_horizon: float = option(0.5, positive=True)
    """How far the parabola's slope holds, in gaps between the two newest full steps, above 0."""

    @property
    def scale(self) -> float:
        return self.foca_horizon

    def strify(self) -> str:
        return "FoCa" if self.foca_horizon == 0.5 else f"FoCaH{self.foca_horizon:g}"


@dataclass(kw_only=True)
class Forecast(SwitchedOn):
    """A predictor whose weights `decide` does not compute; without them, a straight line."""

    by_forecaster: ClassVar[bool] = True
    series: ClassVar[int | str] = 1


@dataclass(kw_only=True)
class DMDCalibratorConfig(Forecast):
    """Linear prediction: the snapshots are taken for sums of two exponentials.

    What dynamic mode decomposition of rank 2 computes, from a few sums over the ring at each full
    step instead of an SVD (`kernels.fit_recurrence`). Where the newest three full steps are not
    equally far apart, a straight line, as TaylorSeer of order 1. Needs a ring that is not fp8.
    """

    window: ClassVar[str] = "dmd_history"
    dmd_history: int = option(4, low=3, high=MAX_SLOTS)
    """Snapshots that are fitted, 3 to 8; the lane keeps as many."""

    dmd_ridge: float = option(1.0, positive=True)
    """Pull towards straight lines, above 0; 1 goes about half the way. What is small (1e-6) follows
    exponentials exactly, and is misled by what changes at random."""

    dmd_rank: Literal[0, 2] = 0
    """0 or 2, which are the same: there are two exponentials."""

    dmd_svd_precision: Literal["low", "medium", "high"] = "medium"
    """As cache-dit has it; there is no SVD here, all three are the same."""

    def strify(self) -> str:
        ridge = "" if self.dmd_ridge == 1 else f"R{self.dmd_ridge:g}"
        return f"DMDH{self.dmd_history}{ridge}"


@dataclass(kw_only=True)
class SpectrumCalibratorConfig(Forecast):
    """A ridge regression on Chebyshev polynomials of the step, blended with a straight line.

    Source: Spectrum, arXiv:2603.01623, which fits all full steps of the request with a ridge of
    0.1; here they are the newest `spectrum_window`, for which that pulls the prediction towards 0.
    The steps of the request must be known: from the pipeline's call or `num_inference_steps`.
    """

    window: ClassVar[str] = "spectrum_window"
    spectrum_order: int = option(4, low=1, high=HIGHEST_ORDER)
    """Highest degree of the polynomials, 1 to 4."""

    spectrum_window: int = option(8, low=2, high=MAX_SLOTS)
    """Snapshots that are fitted, 2 to 8; the lane keeps as many."""

    spectrum_ridge: float = option(1e-4, positive=True)
    """Added to the diagonal of the normal equations, above 0."""

    spectrum_blend: float = option(0.5, high=1)
    """Parts of the regression, 0 to 1; the rest is the line through the two newest snapshots."""

    def strify(self) -> str:
        return (
            f"SpectrumO{self.spectrum_order}W{self.spectrum_window}"
            f"R{self.spectrum_ridge:g}B{self.spectrum_blend:g}"
        )


@dataclass(kw_only=True)
class CustomCalibratorConfig(Forecast):
    """A predictor of your own, by the name under which `register_predictor` knows it."""

    predictor_name: str = option(MISSING, check=lambda who, name: registered(name).name)
    """What was registered."""

    @property
    def slots(self) -> int:
        return registered(self.predictor_name).snapshots

    def strify(self) -> str:
        return f"Custom_{self.predictor_name}"


PREDICTORS: dict[str, type[CalibratorConfig]] = {
    "taylorseer": TaylorSeerCalibratorConfig,
    "hermite": HermiteCalibratorConfig,
    "foca": FoCaCalibratorConfig,
    "dmd": DMDCalibratorConfig,
    "spectrum": SpectrumCalibratorConfig,
    "custom": CustomCalibratorConfig,
}
"""By the name that they have among flat options, as in `enable_foca`."""
