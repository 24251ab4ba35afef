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
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from dbcache.config.options import shown
from dbcache.config.reading import read
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


@dataclass(frozen=True)
class Published:
    """One of TeaCache's polynomials.

    Attributes:
        model: class of the transformer.
        checkpoint: what it was fitted on.
        coefficients: from the highest power down.
        config: entries of the transformer's config by which the checkpoint is known.
    """

    model: str
    checkpoint: str
    coefficients: tuple[float, ...]
    config: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, model: object) -> bool:
        """Whether `model` is of this class and config."""
        config = getattr(model, "config", {})
        return any(cls.__name__ == self.model for cls in type(model).__mro__) and all(
            config.get(name) == value for name, value in self.config.items()
        )


# github.com/ali-vilab/TeaCache, file teacache_*.py of each model's folder; those of Wan 2.1 are the
# ones for its `ref_steps`, whose input is the projected timestep embedding
PUBLISHED = (
    Published(
        "FluxTransformer2DModel",
        "FLUX.1-dev",
        (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    ),
    Published(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideo",
        (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
    ),
    Published(
        "MochiTransformer3DModel",
        "Mochi 1",
        (-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03),
    ),
    Published(
        "CogVideoXTransformer3DModel",
        "CogVideoX-2b",
        (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03),
        {"use_rotary_positional_embeddings": False},
    ),
    Published(
        "CogVideoXTransformer3DModel",
        "CogVideoX-5b",
        (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
        {"use_rotary_positional_embeddings": True, "patch_size_t": None},
    ),
    Published(
        "WanTransformer3DModel",
        "Wan2.1-T2V-1.3B",
        (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
        {"num_attention_heads": 12, "num_layers": 30, "in_channels": 16},
    ),
    Published(
        "WanTransformer3DModel",
        "Wan2.1-T2V-14B",
        (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
        {"num_attention_heads": 40, "num_layers": 40, "in_channels": 16},
    ),
)


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
        for row in PUBLISHED if policy == "teacache" else ():
            if row.fits(model):
                return Calibration(row.coefficients)
        known = ""
        if policy == "teacache":
            known = f"; published are those of {', '.join(row.checkpoint for row in PUBLISHED)}"
        raise ValueError(
            f"policy={policy!r}: {name} must have a calibration, got None; make one with "
            f"dbcache.calibrate(pipe, policy={policy!r}, path=...) and pass it as "
            f"calibration=...{known}"
        )
    content = read_calibration(source)
    wanted = {"policy": policy, "model": name}
    for key, value in wanted.items():
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
    if policy == "teacache":
        values = entry.get("coefficients") if isinstance(entry, Mapping) else None
        if values is None or not _are_numbers(values) or len(values) != DEGREE + 1:
            raise ValueError(
                f"{who}: coefficients must be {DEGREE + 1} numbers, got {shown(values)}"
            )
        return Calibration(tuple(map(float, values)))
    ratios = entry.get("ratios") if isinstance(entry, Mapping) else None
    if not isinstance(ratios, Mapping) or not ratios or not all(map(_are_numbers, ratios.values())):
        raise ValueError(f"{who}: ratios must be a list of numbers per branch, got {shown(ratios)}")
    return Calibration(
        ratios={branch: tuple(map(float, values)) for branch, values in ratios.items()}
    )


def _are_numbers(values: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) > 0
        and all(
            isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
            for x in values
        )
    )


def read_calibration(source: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content of a calibration.

    Raises:
        ValueError: it is damaged or something else. OSError: it cannot be read.
    """
    if isinstance(source, Mapping):
        content: Any = source
    else:
        content = read("calibration", source)
    is_ours = isinstance(content, Mapping) and content.get("format") == FORMAT
    if not is_ours or not isinstance(content.get("stacks"), Mapping):
        what = content.get("format") if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"calibration: it must be of format {FORMAT!r} with stacks, got {shown(what)}; "
            f"make one with dbcache.calibrate"
        )
    return content


def new_calibration(policy: str, model: str, steps: int, stacks: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a calibration, with the versions it was made with."""
    packages = {"dbcache": "dbcache-dit", "diffusers": "diffusers", "torch": "torch"}
    versions = {name: _version(package) for name, package in packages.items()}
    return {
        "format": FORMAT,
        "policy": policy,
        "model": model,
        "steps": steps,
        "stacks": stacks,
        "versions": versions,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
