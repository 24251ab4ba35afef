"""Tells the steps and requests of a transformer apart by the time that its calls are given."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

from dbcache.adapters.blocks.signature import TIMESTEPS, ArgumentFinder


class Move(Enum):
    """How the time of a call lies to that of the call before."""

    UNKNOWN = "the call has no time"
    NONE = "the same time: the same step"
    ON = "another time: the next step"
    BACK = "a time against the direction of the calls before: another image or video begins"


class StepTimes:
    """The times of one request's calls.

    Time may run down or up: the first two times of a request show which way. A time that is
    repeated, as by Heun's method, moves nowhere.

    Args:
        module: the transformer.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._find = ArgumentFinder(module, TIMESTEPS)
        self._last: float | None = None
        self._direction = 0.0
        self._next: tuple[float | None, float] = None, 0.0

    def end_call(self) -> None:
        """Keep the time of the call that was looked at: it has ended without an exception."""
        self._last, self._direction = self._next

    def seen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        """Return the time of a call, unread, for `is_at`."""
        time = self._find(args, kwargs)
        return time, _version(time)

    def is_at(
        self, seen: tuple[Any, int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool | None:
        """Say whether a call has the time that was seen before; reads both from the device.

        A tensor that was written into since then tells nothing: None, as without times.
        """
        time, version = seen
        then, now = _number(time), _number(self._find(args, kwargs))
        if then is None or now is None or _version(time) != version:
            return None
        return then == now

    def move(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Move:
        """Return how a call's time lies to that of the last one; reads it from the device."""
        now = _number(self._find(args, kwargs))
        return Move.UNKNOWN if now is None else self.move_to(now)

    def move_to(self, now: float) -> Move:
        """Return how the time or number `now` of a step lies to that of the last call."""
        last, before = self._last, self._direction
        self._next = now, before
        if last is None:
            return Move.ON
        if now == last:
            return Move.NONE
        direction = 1.0 if now > last else -1.0
        if before and direction != before:
            self._next = now, 0.0
            return Move.BACK
        self._next = now, direction
        return Move.ON


def _version(time: Any) -> int:
    """Return how often a tensor was written into; tensors of `inference_mode` do not tell."""
    return time._version if isinstance(time, torch.Tensor) and not time.is_inference() else 0


def _number(time: Any) -> float | None:
    """Return a time as a number, the largest of several (frames that are given have time 0)."""
    if isinstance(time, int | float):
        return float(time)
    if not isinstance(time, torch.Tensor) or not time.numel() or time.is_meta:
        return None
    return float(time if time.numel() == 1 else time.max())
