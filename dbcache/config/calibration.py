"""What `dbcache.calibrate` wrote, and the polynomials that TeaCache's authors published.

A calibration is JSON, from a file or a dictionary:

    {"format": "dbcache calibration 1", "policy": "magcache", "model": "FluxTransformer2DModel",
     "steps": 28, "stacks": {"blocks": {"ratios": {"cond": [1.0, ...], "uncond": [1.0, ...]}}},
     "versions": {...}}

For TeaCache a stack has ``"coefficients": [...]`` in place of its ratios. The branch of a lane
without a name is "".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from dbcache.config.options import is_number, shown
from dbcache.config.reading import format_of, read
from dbcache.config.scheduled_lane import ScheduledLane
from dbcache.kernels.common.lane_state import DEGREE

FORMAT = "dbcache calibration 1"
OPEN: dict[str, Any] = {"format": FORMAT}
"""Stands for a calibration while one is made."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one stack knows beforehand.

    Attributes:
        coefficients: TeaCache's polynomial, from the highest power down.
        ratios: MagCache's, one per step, by guidance branch.
        lanes: what a schedule says, by guidance branch.
        steps: of the requests that the schedule is for; 0 without one.
        others: schedules for other numbers of steps.
    """

    coefficients: tuple[float, ...] = ()
    ratios: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    lanes: Mapping[str, ScheduledLane] = field(default_factory=dict)
    steps: int = 0
    others: tuple[Calibration, ...] = ()

    def lane_for(self, branch: str | None) -> ScheduledLane:
        """Return the schedule of a branch; one that is not in it takes that of the first."""
        return self.lanes.get(branch or "") or next(iter(self.lanes.values()))

    def ratios_for(self, branch: str | None, steps: int | None) -> tuple[float, ...]:
        """Return one ratio per step, fitted to `steps` by taking the nearest (as MagCache does).

        A branch that was not calibrated takes the ratios of the first one that was.
        """
        known = self.ratios.get(branch or "") or next(iter(self.ratios.values()))
        if steps is None or steps == len(known):
            return known
        scale = (len(known) - 1) / (steps - 1) if steps > 1 else 0.0
        start = len(known) - 1 if steps == 1 else 0
        return tuple(known[start + round(step * scale)] for step in range(steps))


# github.com/ali-vilab/TeaCache, file teacache_*.py of each model's folder; those of Wan 2.1 are the
# ones for its `ref_steps`, whose input is the projected timestep embedding
PUBLISHED = {
    "FLUX.1-dev": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "HunyuanVideo": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "Mochi 1": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    "CogVideoX-2b": (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "CogVideoX-5b": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "Wan2.1-T2V-1.3B": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "Wan2.1-T2V-14B": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
}
"""TeaCache's polynomials by the checkpoint that they were fitted on, the highest power first."""

_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1-dev": ("FluxTransformer2DModel", {}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "Mochi 1": ("MochiTransformer3DModel", {}),
    "CogVideoX-2b": ("CogVideoXTransformer3DModel", {"use_rotary_positional_embeddings": False}),
    "CogVideoX-5b": (
        "CogVideoXTransformer3DModel",
        {"use_rotary_positional_embeddings": True, "patch_size_t": None},
    ),
    "Wan2.1-T2V-1.3B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "num_layers": 30, "in_channels": 16},
    ),
    "Wan2.1-T2V-14B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "num_layers": 40, "in_channels": 16},
    ),
}
"""Class of each checkpoint, and entries of the config by which one of several is known."""


def checkpoint_of(model: object) -> str | None:
    """Return the checkpoint of `PUBLISHED` that `model` is of by class and config, or None."""
    classes = {cls.__name__ for cls in type(model).__mro__}
    config = getattr(model, "config", {})
    for checkpoint, (name, entries) in _MODELS.items():
        if name in classes and all(config.get(key) == entries[key] for key in entries):
            return checkpoint
    return None


def find_calibration(policy: str, source: Any, model: object, stack: str) -> Calibration:
    """Return what `source` says of one stack.

    Args:
        policy: "teacache" or "magcache".
        source: path of a file, its content, or None: for TeaCache the published polynomial.
        model: the module that has the blocks.
        stack: name of the stack.

    Raises:
        ValueError: there is none, or it is for another policy, model or stack, or damaged.
        OSError: the file cannot be read.
    """
    if source is OPEN:
        return Calibration(ratios={"": (1.0,)})
    name = type(model).__name__
    if source is None:
        published = PUBLISHED if policy == "teacache" else {}
        checkpoint = checkpoint_of(model)
        if checkpoint in published:
            return Calibration(published[checkpoint])
        known = f"; published are those of {', '.join(published)}" if published else ""
        raise ValueError(
            f"policy={policy!r}: {name} must have a calibration, got None; make one with "
            f"dbcache.calibrate(pipe, policy={policy!r}, path=...) and pass it as "
            f"calibration=...{known}"
        )
    content = source if isinstance(source, Mapping) else read("calibration", source)
    found = format_of(content)
    if found != FORMAT or not isinstance(content.get("stacks"), Mapping):
        raise ValueError(
            f"calibration: it must be of format {FORMAT!r} with stacks, got {shown(found)}; "
            f"make one with dbcache.calibrate"
        )
    for key, value in (("policy", policy), ("model", name)):
        if content.get(key) != value:
            raise ValueError(
                f"calibration: it must be of {key} {value!r}, got one of "
                f"{shown(content.get(key))}; make another with dbcache.calibrate"
            )
    stacks = content["stacks"]
    if stack not in stacks:
        raise ValueError(
            f"calibration: it must have the stack {stack!r}, got {shown(list(stacks))}; "
            f"make another with dbcache.calibrate"
        )
    return _parse(policy, stacks[stack], stack)


def _parse(policy: str, entry: Any, stack: str) -> Calibration:
    """Return one stack's entry, checked."""
    who = f"calibration of {stack!r}"
    entry = entry if isinstance(entry, Mapping) else {}
    if policy == "teacache":
        given = entry.get("coefficients")
        coefficients = _numbers(given)
        if len(coefficients) != DEGREE + 1:
            raise ValueError(
                f"{who}: coefficients must be {DEGREE + 1} numbers, got {shown(given)}"
            )
        return Calibration(coefficients)
    given = entry.get("ratios")
    ratios = given if isinstance(given, Mapping) else {}
    ratios = {branch: _numbers(values) for branch, values in ratios.items()}
    if not ratios or not all(ratios.values()):
        raise ValueError(f"{who}: ratios must be a list of numbers per branch, got {shown(given)}")
    return Calibration(ratios=ratios)


def _numbers(values: Any) -> tuple[float, ...]:
    """Return a sequence of finite numbers as floats; () for anything else."""
    if not isinstance(values, Sequence) or not all(is_number(x, int | float) for x in values):
        return ()
    return tuple(map(float, values)) if all(map(math.isfinite, values)) else ()


def new_calibration(policy: str, model: str, steps: int, stacks: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a calibration, with the versions it was made with."""
    return {
        "format": FORMAT,
        "policy": policy,
        "model": model,
        "steps": steps,
        "stacks": stacks,
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions that a file is made with, None for what is not installed."""
    packages = {"dbcache": "dbcache-dit", "diffusers": "diffusers", "torch": "torch"}
    found: dict[str, str | None] = dict.fromkeys(packages)
    for name, package in packages.items():
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(package)
    return found
