"""Schedule files: what `dbcache.tune` found for a model, a scheduler and a number of steps.

    {"format": "dbcache schedule 1", "scheduler": "FlowMatchEulerDiscreteScheduler",
     "num_inference_steps": 28, "scheduler_steps": 28, "snapshots": 4,
     "levels": {"high": 0, "balanced": 1, "fast": 2},
     "transformers": [{"model": "FluxTransformer2DModel", "calls": 28}],
     "rows": [{"full": 14, "speedup": {"expected": 1.93, "low": 1.9, "high": 1.95},
               "psnr": {"mean": 51.2, "std": 2.3, "low": 46.0, "images": 8},
               "transformers": [{"": {"mask": "1101...", "weights": {"2": [1.9, -0.9]},
                                      "changes": {"2": 0.03}}}]}, ...]}

A row has per transformer the guidance branches, by name; "" is a lane without one. Rows are sorted,
the most full calls first, and have lower quality and higher speed from row to row. A file for
several numbers of steps has the schedules of the others under "others".
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dbcache.config.cache import DBCacheConfig, ParamsModifier
from dbcache.config.calibration import Calibration
from dbcache.config.options import check_int, check_number, shown
from dbcache.config.reading import format_of, read
from dbcache.config.scheduled_lane import MAX_STEPS, ScheduledLane
from dbcache.config.scheduled_predictor import ScheduledCalibratorConfig
from dbcache.kernels.common.lane_state import MAX_SLOTS
from dbcache.notices import say

FORMAT = "dbcache schedule 1"
PART = "dbcache schedule 1, a row of one transformer"
LEVELS = ("high", "balanced", "fast")
Source = str | os.PathLike[str] | Mapping[str, Any]

TOLERANCE = 0.975
"""A row of this times the speed that was asked for will do: 1.95x for "2x"."""

_SPEED = re.compile(r"\s*([\d.]+)\s*x\s*", re.IGNORECASE)
_PSNR = re.compile(r"\s*([\d.]+)\s*db\s*", re.IGNORECASE)
_FULL = re.compile(r"\s*(\d+)\s*(?:full|steps|full steps)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Schedule:
    """A schedule file, checked.

    Attributes:
        content: what the file holds.
        steps: of the requests that it is for.
        name: where it is from, for errors.
        others: schedules for other numbers of steps, of the same transformers.
    """

    content: Mapping[str, Any]
    steps: int
    name: str
    others: tuple[Schedule, ...] = ()

    @classmethod
    def of(cls, source: Source, who: str = "schedule") -> Schedule:
        """Return a file, or its content, checked.

        Raises:
            TypeError: it is neither. ValueError: it is damaged, or something else. OSError: the
                file cannot be read.
        """
        if isinstance(source, Mapping):
            content, name = source, "the schedule"
        elif isinstance(source, str | os.PathLike):
            content, name = read(who, source), os.fspath(source)
        else:
            raise TypeError(f"{who}: must be a path or a mapping, got {shown(source)}")
        if format_of(content) != FORMAT:
            raise ValueError(
                f"{who}: {name} must be of format {FORMAT!r}, got {shown(format_of(content))}; "
                f"make one with dbcache.tune"
            )
        steps = check_int(f"{who}: num_inference_steps", content.get("num_inference_steps"), 1)
        others = content.get("others", [])
        if not isinstance(others, list) or not all(isinstance(x, Mapping) for x in others):
            raise ValueError(f"{who}: others in {name} must be schedules, got {shown(others)}")
        others = [cls.of(other, f"{who}: others") for other in others]
        schedule = cls(content, steps, name, tuple(replace(x, name=name) for x in others))
        for key in ("rows", "transformers"):
            if not isinstance(content.get(key), Sequence) or not content[key]:
                raise ValueError(f"{who}: {name} must have {key}, got {shown(content.get(key))}")
        check_int(f"{who}: snapshots", content.get("snapshots"), 3, MAX_SLOTS)
        for index in range(len(content["rows"])):
            schedule.parts(index)
        schedule._check_others(who)
        return schedule

    def _check_others(self, who: str) -> None:
        """Raise a ValueError if other numbers of steps do not go with this one."""
        alike = [_what_is_alike(each.content) for each in (self, *self.others)]
        counts = [each.steps for each in (self, *self.others)]
        if alike != alike[:1] * len(alike) or len(set(counts)) < len(counts):
            raise ValueError(
                f"{who}: others in {self.name} must have the same transformers, scheduler and "
                f"snapshots and other numbers of steps, got {counts} steps and {alike}"
            )

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows, the most full calls first."""
        return self.content["rows"]

    def parts(self, index: int) -> list[dict[str, Any]]:
        """Return a row's settings of each transformer, as `DBCacheConfig.calibration` takes them.

        Raises:
            ValueError: the row is damaged.
        """
        models, row = self.content["transformers"], self.rows[index]
        who = f"{self.name}: row {index}"
        if len(row.get("transformers", ())) != len(models):
            raise ValueError(f"{who} must have an entry for each of {len(models)} transformers")
        parts = []
        for model, branches in zip(models, row["transformers"], strict=True):
            part = {
                "format": PART,
                "model": str(model.get("model")),
                "calls": check_int(f"{who}: calls", model.get("calls"), 1, MAX_STEPS),
                "steps": self.content.get("scheduler_steps") or self.steps,
                "branches": branches,
            }
            _lanes(who, part)
            parts.append(part)
        return parts

    def find(self, target: Any, who: str = "schedule") -> int:
        """Return the row that a target means at this number of steps.

        Args:
            target: "2x" or 2.0 (the row of the highest quality that is as fast), "45dB" (the
                fastest row of that quality), "16 full" (at most so many full calls), a level, or
                None: the only row, or "balanced".
            who: what is asked, for errors.

        Raises:
            ValueError: no row fits; the error lists those there are. TypeError: no target.
        """
        levels = self.content.get("levels", {})
        if target is None:
            target = "balanced" if "balanced" in levels else "the only row"
            if len(self.rows) == 1:
                return 0
        if isinstance(target, int | float) and not isinstance(target, bool):
            target = f"{check_number(f'{who}: target', target, positive=True):g}x"
        if not isinstance(target, str):
            raise TypeError(f"{who}: target must be a string or a number, got {shown(target)}")
        if target in levels:
            return int(levels[target])
        found = [i for i, row in enumerate(self.rows) if _fits(row, target)]
        if not found:
            raise ValueError(
                f"{who}: target must be one of {', '.join(levels) or 'no level'}, a speed as "
                f"'2x', a quality as '45dB' or a number as '16 full' that {self.name} reaches, got "
                f"{shown(target)}; at {self.steps} steps it has "
                f"{'; '.join(map(described, self.rows))}"
            )
        return found[-1] if _PSNR.fullmatch(target) else found[0]

    def settings(
        self, target: Any = None, guard: float | None = None, who: str = "schedule"
    ) -> list[ParamsModifier]:
        """Return a row as the settings of each transformer.

        Args:
            target: as in `find`.
            guard: run a step in full that moves more than this times what the schedule has seen.
            who: what is asked, for errors.
        """
        every = [each.parts(each.find(target, who)) for each in (self, *self.others)]
        parts = [{**part, "others": others} for part, *others in zip(*every, strict=True)]
        policy: dict[str, Any] = {"policy": "schedule"}
        if guard is not None:
            check_number(f"{who}: guard", guard, positive=True)
            known = (
                any(lane.get("changes") for part in row for lane in part["branches"].values())
                for row in every
            )
            if not all(known):
                raise ValueError(
                    f"{who}: guard must come with a schedule that holds the changes of its steps, "
                    f"got {self.name} without; tune with guard=True"
                )
            policy = {"policy": "guarded_schedule", "residual_diff_threshold": float(guard)}
        predictor = ScheduledCalibratorConfig(snapshots=self.content["snapshots"])
        configs = [
            DBCacheConfig(
                **policy,
                calibration=part,
                num_inference_steps=None if part["others"] else part["calls"],
            )
            for part in parts
        ]
        return [
            ParamsModifier(cache_config=config, calibrator_config=predictor) for config in configs
        ]

    def check_model(self, models: Sequence[str], scheduler: Any, who: str = "schedule") -> None:
        """Raise a ValueError if the schedule is of other transformers or of another scheduler.

        A scheduler of the same class with other settings is warned of.
        """
        made_for = [str(model.get("model")) for model in self.content["transformers"]]
        if list(models) != made_for:
            raise ValueError(
                f"{who}: {self.name} was made for {', '.join(made_for)}, got "
                f"{', '.join(models)}; use a schedule of that model, dbcache.tune makes one"
            )
        made_with = self.content.get("scheduler")
        name = None if scheduler is None else type(scheduler).__name__
        if made_with and name is not None and name != made_with:
            raise ValueError(
                f"{who}: {self.name} was made with the scheduler {made_with}, got {name}; use that "
                f"scheduler, or tune with this one"
            )
        settings, now = self.content.get("scheduler_config", {}), getattr(scheduler, "config", {})
        differing = [key for key in settings if key in now and now[key] != settings[key]]
        if differing:
            named = ", ".join(
                f"{key}={now[key]!r} in place of {settings[key]!r}" for key in differing
            )
            say(
                f"{who}: {self.name} was made with other settings of the scheduler, got {named}; "
                f"its quality is not known, tune with these"
            )


def _what_is_alike(content: Mapping[str, Any]) -> tuple[Any, ...]:
    models = [model.get("model") for model in content["transformers"]]
    return models, content.get("scheduler"), content["snapshots"]


def described(row: Mapping[str, Any]) -> str:
    """Return a row in a few words."""
    speed, psnr = row.get("speedup", {}).get("expected"), row.get("psnr", {}).get("mean")
    words = [f"{row.get('full')} full"]
    words += [] if speed is None else [f"{speed:.2f}x"]
    words += [] if psnr is None else [f"{psnr:.1f} dB"]
    return ", ".join(words)


def _fits(row: Mapping[str, Any], target: str) -> bool:
    if match := _SPEED.fullmatch(target):
        speed = row.get("speedup", {}).get("expected") or 0.0
        return bool(speed >= TOLERANCE * float(match[1]))
    if match := _PSNR.fullmatch(target):
        psnr = row.get("psnr", {}).get("mean")
        return psnr is None or psnr >= float(match[1])
    match = _FULL.fullmatch(target)
    return match is not None and row["full"] <= int(match[1])


def _lane(who: str, entry: Any, calls: int) -> ScheduledLane:
    """Return the entry of one branch, checked."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("mask"), str):
        raise ValueError(f"{who}: a branch must have a mask, got {shown(entry)}")
    mask = entry["mask"]
    if len(mask) != calls or set(mask) - {"0", "1"} or not mask.startswith("1"):
        raise ValueError(
            f"{who}: a mask must be {calls} digits 0 and 1 that begin with 1, got {shown(mask)}"
        )
    weights, changes = {}, {}
    for call, values in entry.get("weights", {}).items():
        if not call.isdigit() or int(call) >= calls or mask[int(call)] != "0":
            raise ValueError(f"{who}: weights must be of a cached call, got {shown(call)}")
        if not 0 < len(values) <= MAX_SLOTS or not all(map(math.isfinite, values)):
            raise ValueError(f"{who}: 1 to {MAX_SLOTS} numbers must be the weights of call {call}")
        weights[int(call)] = tuple(map(float, values))
    for call, change in entry.get("changes", {}).items():
        changes[int(call)] = float(check_number(f"{who}: a change", change))
    return ScheduledLane(tuple(map(int, mask)), weights, changes)


def _lanes(who: str, part: Mapping[str, Any]) -> dict[str, ScheduledLane]:
    """Return what a row says of each branch of a transformer, checked."""
    lanes = {name: _lane(who, entry, part["calls"]) for name, entry in part["branches"].items()}
    if not lanes:
        raise ValueError(f"{who} must have a branch, got none")
    return lanes


def lanes_of(source: Any, model: object, stack: str) -> Calibration:
    """Return what a part of a row says to a stack of `model`.

    Raises:
        ValueError: it is none, damaged, or of another model.
    """
    if not isinstance(source, Mapping) or source.get("format") != PART:
        raise ValueError(
            f"{stack}: policy='schedule' must come from a schedule, got calibration="
            f"{shown(source)}; call dbcache.enable(pipe, schedule='file.json')"
        )
    name = type(model).__name__
    if source["model"] != name:
        raise ValueError(
            f"{stack}: the schedule was made for {source['model']}, got {name}; use one of this "
            f"model"
        )
    others = tuple(lanes_of(other, model, stack) for other in source.get("others", ()))
    return Calibration(lanes=_lanes(stack, source), steps=source["steps"], others=others)


def fit_to_steps(
    calibration: Calibration | None,
    steps: int | None,
    at_most: int | None,
    who: str,
    shared: int | None = None,
) -> Calibration | None:
    """Return a calibration for a request; a schedule is cut to a request that begins later.

    Args:
        calibration: of the settings; of several numbers of steps that of the request is taken.
        steps: of the request, None if nothing tells.
        at_most: as many as the scheduler has, which image-to-image cuts short at the beginning.
        who: whose request it is, for the error.
        shared: steps of a loop that other transformers run the rest of; it chooses among several.

    Raises:
        ValueError: the schedule is of another number of steps.
    """
    if calibration is None or not calibration.lanes:
        return calibration
    every = (calibration, *calibration.others)
    counts = [one.steps for one in every]
    if calibration.others and steps is None:
        steps = at_most = shared
    if calibration.others and steps is None:
        raise ValueError(
            f"{who}: the schedule is for {' or '.join(map(str, counts))} steps and nothing tells "
            f"how many the request has; call its pipeline, or give num_inference_steps to "
            f"start_request or enable"
        )
    if steps is None:
        return calibration
    for one in sorted(every, key=lambda one: one.steps != steps):
        calls = len(next(iter(one.lanes.values())).mask)
        if steps in (calls, one.steps) and at_most in (None, one.steps):
            return one
        if steps < calls and at_most == one.steps:
            lanes = {name: lane.cut(calls - steps) for name, lane in one.lanes.items()}
            return replace(one, lanes=lanes)
    raise ValueError(
        f"{who}: the schedule was made for {' or '.join(map(str, counts))} steps, got a request of "
        f"{steps if at_most in (None, *counts) else at_most}; call with "
        f"num_inference_steps={' or '.join(map(str, counts))}, or use a schedule for it: "
        f"dbcache.tune makes one"
    )


def to_text(content: Mapping[str, Any]) -> str:
    """Return the text of a file: a row per line, so that a change of it can be read."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in content["rows"])
    head = {key: value for key, value in content.items() if key not in ("rows", "others")}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines.append(f' "rows": [\n{rows}\n ]')
    if content.get("others"):
        others = ",\n".join(to_text(other).rstrip() for other in content["others"])
        lines.append(f' "others": [\n{others}\n ]')
    return "{\n" + ",\n".join(lines) + "\n}\n"
