"""Predictors of users: `register_predictor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dbcache.config.options import check_int, shown
from dbcache.kernels.common.lane_state import MAX_SLOTS

Weigh = Callable[[Sequence[int], int], Sequence[float]]
"""From the steps of the snapshots, newest first, and the step to predict: a weight per snapshot."""


@dataclass(frozen=True, slots=True)
class RegisteredPredictor:
    """A function of the steps, and how many snapshots it wants."""

    name: str
    snapshots: int
    weigh: Weigh


_PREDICTORS: dict[str, RegisteredPredictor] = {}


def register_predictor(name: str, *, snapshots: int = 2) -> Callable[[Weigh], Weigh]:
    """Make a predictor of your own known, for `CustomCalibratorConfig`.

        @dbcache.register_predictor("halfway", snapshots=2)
        def halfway(steps, step):
            if len(steps) < 2:
                return [1.0]
            ahead = (step - steps[0]) / (steps[0] - steps[1]) / 2
            return [1 + ahead, -ahead]

        halfway_config = dbcache.CustomCalibratorConfig(predictor_name="halfway")
        dbcache.enable(pipe, calibrator_config=halfway_config)

    The function takes the steps of the snapshots there are (1 to `snapshots`), newest first, and
    the step to predict, and returns a finite weight for each of the newest snapshots; those it
    leaves out have weight 0. It is called on the host at each cached step, when it is known that
    the step is cached, and the weights are copied to the device, so nothing waits. That is eager
    execution: in a captured graph the weights would stay those of the capture.

    Args:
        name: any name; a later registration of it takes the place of the earlier one, for configs
            that are made from then on.
        snapshots: ring slots per lane, 1 to 8.

    Raises:
        TypeError, ValueError: a name or number that is not allowed.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"register_predictor: name must be a string, got {shown(name)}")
    check_int("register_predictor: snapshots", snapshots, 1, MAX_SLOTS)

    def register(weigh: Weigh) -> Weigh:
        if not callable(weigh):
            raise TypeError(f"register_predictor: {name!r} must be a function, got {shown(weigh)}")
        _PREDICTORS[name] = RegisteredPredictor(name, snapshots, weigh)
        return weigh

    return register


def registered(name: str) -> RegisteredPredictor:
    """Return the predictor of that name.

    Raises:
        ValueError: there is none; the error lists those there are.
    """
    if not isinstance(name, str) or name not in _PREDICTORS:
        known = ", ".join(sorted(_PREDICTORS)) or "none"
        raise ValueError(
            f"CustomCalibratorConfig.predictor_name must be registered, got {shown(name)}; "
            f"known: {known}. Register it with dbcache.register_predictor first"
        )
    return _PREDICTORS[name]
