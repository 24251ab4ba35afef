"""The trained models that schedules are compared on, and the methods beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import methods
from bench.methods import Bench, Method
from dbcache.cli.drawn import digits_drawing, videos_drawing
from dbcache.demo import digits, moving_digits
from dbcache.demo.motion import FrameClassifier

OWN = {method.name: method for method in methods.METHODS if method.engine == "dbcache"}
PEERS = {method.name: method for method in methods.METHODS if method.engine == methods.PEER}


class MovingBench(Bench):
    """Draws batches of videos of digits, with guidance."""

    def __init__(self, steps: int, per_digit: int, device: str) -> None:
        self.pipe = moving_digits.load_pipeline(device=device)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps = steps
        self.labels = torch.arange(moving_digits.NUM_DIGITS).repeat(per_digit)
        names = list(moving_digits.DIRECTIONS)
        turns = [names[(i + i // 10) % len(names)] for i in range(len(self.labels))]
        self.videos = list(zip(self.labels.tolist(), turns, strict=True))
        self.classifier = FrameClassifier()

    def images(self, seed: int) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        call = {"num_inference_steps": self.steps, "generator": generator}
        return moving_digits.decode(self.pipe(**moving_digits.prompt(self.videos), **call).frames)


class StudentBench(Bench):
    """Draws batches of digits with the model of few steps."""

    def __init__(self, steps: int, per_digit: int, device: str) -> None:
        super().__init__(steps, per_digit, device, digits.STUDENT)


def _at(name: str, by_level: dict[str, dict[str, Any]], found: dict[str, Method] = OWN) -> Method:
    """Return a method of `bench.methods` with options of another model per level."""
    method = found[name]
    return Method(name, method.calibrator, method.engine, method.cache, by_level)


def _thresholds(name: str, *by_level: float) -> Method:
    levels = dict(zip(("2x", "3x", "4x"), by_level, strict=True))
    return _at(name, {k: {"residual_diff_threshold": x} for k, x in levels.items()})


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        name: of the model, and of its file of a schedule.
        steps: of a request.
        full: full steps of the tuned schedule, by level.
        bench: draws batches.
        drawing: of a seed and a number of steps, returns what draws to tune with.
        beside: what the schedule is compared with.
        what: is drawn, for the table.
        per_branch: whether the branches of guidance have masks of their own.
    """

    name: str
    steps: int
    full: dict[str, int]
    bench: Callable[[int, int, str], Bench]
    drawing: Callable[[int, int], Any]
    beside: tuple[Method, ...]
    what: str
    per_branch: bool = False

    @property
    def path(self) -> Path:
        """The schedule."""
        return methods.CALIBRATIONS / f"{self.name}_schedule.json"

    @property
    def results(self) -> Path:
        """The records of the comparison."""
        return methods.ROOT / "results" / f"front_{self.name}.json"

    @property
    def picture(self) -> Path:
        """The comparison, drawn."""
        return methods.DOCS.parent / f"front_{self.name}.svg"

    @property
    def tuned(self) -> Method:
        """The schedule as a method."""
        return Method(
            "tuned schedule",
            cache={"schedule": str(self.path)},
            levels={level: {"target": f"{full} full"} for level, full in self.full.items()},
            alone=True,
        )


DIGITS = Subject(
    "digits",
    50,
    {"1.5x": 33, "2x": 25, "3x": 16, "4x": 12},
    Bench,
    digits_drawing,
    (
        OWN["EasyCache, FoCa"],
        OWN["TeaCache, FoCa"],
        OWN["MagCache, FoCa"],
        OWN["FoCa, by threshold"],
        OWN["FoCa"],
        OWN["TaylorSeer 2"],
        OWN["reuse"],
        PEERS["TaylorSeer 2"],
        PEERS["FoCa"],
        PEERS["reuse"],
    ),
    "images of the digits model",
)
MOVING = Subject(
    "moving_digits",
    50,
    {"2x": 25, "3x": 16, "4x": 12},
    MovingBench,
    videos_drawing,
    (
        _thresholds("EasyCache, FoCa", 0.02, 0.04, 0.06),
        _thresholds("SeaCache, FoCa", 0.1, 0.2, 0.3),
        _thresholds("FoCa, by threshold", 0.12, 0.25, 0.45),
        *(OWN[name] for name in ("FoCa", "TaylorSeer 1", "TaylorSeer 2", "DMD", "reuse")),
        *(PEERS[name] for name in ("TaylorSeer 1", "TaylorSeer 2", "reuse")),
    ),
    "videos of the moving-digits model",
    per_branch=True,
)

_FEW = {
    "1.3x": {"max_warmup_steps": 4, "max_continuous_cached_steps": 1},
    "1.6x": {"max_warmup_steps": 2, "max_continuous_cached_steps": 1},
}
"""At 8 steps: two of them cached, and three."""

STUDENT = Subject(
    "digits_student",
    8,
    {"1.3x": 6, "1.6x": 5},
    StudentBench,
    digits_drawing,
    (
        *(_at(name, _FEW) for name in ("reuse", "TaylorSeer 1", "FoCa")),
        *(_at(name, _FEW, PEERS) for name in ("reuse", "TaylorSeer 1")),
    ),
    "images of the digits student",
)

SUBJECTS = {subject.name: subject for subject in (DIGITS, MOVING, STUDENT)}
