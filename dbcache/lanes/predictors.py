"""Predictors whose weights `decide` does not compute.

`decide` computes the weights of all that is a series in differences. The others overwrite these
weights at a cached step, before `predict`, with an op of their own or on the host.
"""

from __future__ import annotations

import math

import torch

from dbcache.config.cache import StackSettings
from dbcache.config.predictor_registry import registered
from dbcache.config.predictors import (
    CalibratorConfig,
    CustomCalibratorConfig,
    DMDCalibratorConfig,
    SpectrumCalibratorConfig,
)
from dbcache.config.scheduled_predictor import ScheduledCalibratorConfig
from dbcache.kernels.common.lane_state import LaneState, spread
from dbcache.kernels.prediction import spectrum
from dbcache.kernels.prediction.fit_recurrence import fit_recurrence
from dbcache.kernels.prediction.recurrence import recurrence_weights
from dbcache.kernels.prediction.spectrum import spectrum_weights
from dbcache.lanes.forecaster import Forecaster, Snapshots
from dbcache.lanes.scheduled import ScheduledWeights


def check_steps_are_known(calibrator: CalibratorConfig, steps: int | None, who: str) -> None:
    """Raise a ValueError if a request of `who` needs to know its number of steps and does not."""
    if steps is None and isinstance(calibrator, SpectrumCalibratorConfig):
        raise ValueError(
            f"{who}: SpectrumCalibratorConfig must know the number of steps, got none; set "
            f"num_inference_steps, or call the pipeline that the cache is enabled on"
        )


def check_runs_on_device(calibrator: CalibratorConfig, who: str) -> None:
    """Raise a ValueError if the weights of `who` are computed on the host."""
    if isinstance(calibrator, CustomCalibratorConfig):
        raise ValueError(
            f"{who}: steps recorded as CUDA graphs must have a predictor that runs on the device, "
            f"got {calibrator.strify()}, a function of the host; leave out cuda_graph"
        )


class _Spectrum(Forecaster):
    """A ridge regression on Chebyshev polynomials: needs to know how long a request is."""

    def __init__(self, settings: StackSettings, device: torch.device, branch: str | None) -> None:
        config, (hidden, encoder) = settings.predictor, settings.predicts
        assert isinstance(config, SpectrumCalibratorConfig)
        parameters = torch.zeros(spectrum.NUM_PARAMETERS, dtype=torch.float64, device="cpu")
        parameters[spectrum.ORDER] = config.spectrum_order * hidden
        parameters[spectrum.ENCODER_ORDER] = config.spectrum_order * encoder
        parameters[spectrum.RIDGE] = config.spectrum_ridge
        parameters[spectrum.BLEND] = config.spectrum_blend
        self._parameters = parameters.to(device)
        self.replan(settings)

    def replan(self, settings: StackSettings) -> None:
        last = spectrum.LAST_STEP
        self._parameters[last : last + 1].fill_(float(max(1, (settings.steps or 0) - 1)))

    def weigh(self, state: LaneState, step: int) -> None:
        spectrum_weights(state, self._parameters)


class _Recurrence(Forecaster):
    """A linear recurrence per stream, fitted anew at each full step."""

    def __init__(self, settings: StackSettings, device: torch.device, branch: str | None) -> None:
        assert isinstance(settings.predictor, DMDCalibratorConfig)
        self._ridge = settings.predictor.dmd_ridge
        self._fits = [
            torch.full((2,), math.nan, dtype=torch.float64, device=device) if is_used else None
            for is_used in settings.predicts
        ]

    def learn(self, state: LaneState, stored: Snapshots, step: int, is_first: bool) -> None:
        for fit, snapshots in zip(self._fits, stored, strict=True):
            if fit is not None and snapshots is not None:
                fit_recurrence(snapshots, state, fit, ridge=self._ridge)

    def weigh(self, state: LaneState, step: int) -> None:
        recurrence_weights(state, *self._fits)

    def tensors(self) -> list[torch.Tensor]:
        return [fit for fit in self._fits if fit is not None]


class _OnHost(Forecaster):
    """A function of the user: the host knows the steps of the snapshots without reading them."""

    def __init__(self, settings: StackSettings, device: torch.device, branch: str | None) -> None:
        assert isinstance(settings.predictor, CustomCalibratorConfig)
        self._predictor = registered(settings.predictor.predictor_name)
        self._used = settings.predicts
        self._full_steps: list[int] = []

    def learn(self, state: LaneState, stored: Snapshots, step: int, is_first: bool) -> None:
        if is_first:
            self._full_steps.clear()
        self._full_steps.append(step)

    def weigh(self, state: LaneState, step: int) -> None:
        slots = self._predictor.snapshots
        steps = tuple(self._full_steps[: -slots - 1 : -1])
        weights = [float(w) for w in self._predictor.weigh(steps, step)]
        if len(weights) > len(steps) or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"predictor {self._predictor.name!r}: at most {len(steps)} finite weights must be "
                f"returned for the steps {steps} and step {step}, got {weights}"
            )
        weights = spread(weights, len(self._full_steps), slots)
        by_slot = torch.tensor(weights, dtype=torch.float32, device="cpu")
        if state.weights.is_cuda:
            by_slot = by_slot.pin_memory()
        for is_used, target in zip(self._used, (state.weights, state.encoder_weights), strict=True):
            if is_used:
                target.copy_(by_slot, non_blocking=True)


FORECASTERS: dict[type[CalibratorConfig], type[Forecaster]] = {
    SpectrumCalibratorConfig: _Spectrum,
    ScheduledCalibratorConfig: ScheduledWeights,
    DMDCalibratorConfig: _Recurrence,
    CustomCalibratorConfig: _OnHost,
}
"""What computes the weights of a predictor; those of the others `decide` computes."""


def make_forecaster(
    settings: StackSettings, device: torch.device, branch: str | None = None
) -> Forecaster | None:
    """Return what the predictor in `settings` needs, None where `decide` does it all."""
    for config, forecaster in FORECASTERS.items():
        if isinstance(settings.predictor, config) and any(settings.predicts):
            return forecaster(settings, device, branch)
    return None
