"""What `dbcache.calibrate` notes of full steps, and what it makes of it.

MagCache (arXiv:2506.09045): per step and branch, how large the residual of all blocks is relative
to that of the step before: the mean over tokens of the ratio of L2 norms; 1 at the first step.

TeaCache (arXiv:2411.19108): pairs of relative L1 changes from step to step, of the first block's
modulated input and of the transformer's output, and the polynomial of degree 4 that fits them best.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from dbcache.adapters.signals.measurements import first_tensor
from dbcache.config.calibration import new_calibration
from dbcache.kernels.common.lane_state import DEGREE

TINY = 1e-8
"""Added to the norm that a ratio is taken over, for tokens that nothing was added to."""
LEAST_PAIRS = 2 * (DEGREE + 1)


class _Rows:
    """Notes one row of numbers per step, for each branch and request; the numbers stay on device.

    Args:
        stack: whose steps are noted; all of them must be full.
    """

    def __init__(self, stack: Any) -> None:
        self.stack = stack
        self.runs: dict[str, list[list[torch.Tensor]]] = defaultdict(list)
        # by lane: requests that overlap are told apart
        self._latest: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def on_blocks(self, step: Any, h_out: torch.Tensor) -> None:
        """Note what comes out of the stack's blocks."""

    def on_output(self, step: Any, output: Any) -> None:
        """Note what the transformer returns."""

    def row(self, now: Any, before: Any) -> torch.Tensor:
        """Return the numbers of a step, of what was noted at it and at the one before."""
        raise NotImplementedError

    def note(self, step: Any, now: Any) -> None:
        """Append a step's row, none on the first step of a request, and keep what it is made of."""
        latest = None if step.lane.steps.step == 1 else self._latest.get(step.lane)
        if latest is None:
            run: list[torch.Tensor] = []
            self.runs[step.branch or ""].append(run)
        else:
            run, before = latest
            run.append(self.row(now, before))
        self._latest[step.lane] = run, now

    def rows(self) -> dict[str, numpy.ndarray[Any, Any]]:
        """Return per branch what was noted: (requests, steps - 1, numbers of a row).

        Raises:
            ValueError: requests had different numbers of steps. RuntimeError: there were no two
                steps.
        """
        lengths = {len(run) for runs in self.runs.values() for run in runs}
        if len(lengths) > 1:
            raise ValueError(
                f"calibrate: all requests and branches must have as many steps, got "
                f"{sorted(length + 1 for length in lengths)}; calibrate each by itself"
            )
        if not lengths or lengths == {0}:
            raise RuntimeError(
                f"calibrate: {self.stack.name} must have run two steps or more, got none; call the "
                f"pipeline inside the with block"
            )
        return {
            branch: torch.stack([torch.stack(run) for run in runs]).double().cpu().numpy()
            for branch, runs in self.runs.items()
        }


class Magnitudes(_Rows):
    """MagCache's ratios."""

    @torch.no_grad()
    def on_blocks(self, step: Any, h_out: torch.Tensor) -> None:
        self.note(step, (h_out.float() - step.h_fn.float()).norm(dim=-1))

    def row(self, now: Any, before: Any) -> torch.Tensor:
        return (now / (before + TINY)).mean().reshape(1)

    def result(self) -> dict[str, Any]:
        """Return the stack's entry of the calibration."""
        means = {branch: rows.mean((0, 2)).tolist() for branch, rows in self.rows().items()}
        return {"ratios": {branch: [1.0, *ratios] for branch, ratios in means.items()}}


class Changes(_Rows):
    """TeaCache's polynomial."""

    @torch.no_grad()
    def on_output(self, step: Any, output: Any) -> None:
        if step.lane is not None:
            now = step.run.source.measured(), first_tensor(self.stack.name, output)
            self.note(step, [x.float().clone() for x in now])

    def row(self, now: Any, before: Any) -> torch.Tensor:
        pairs = zip(now, before, strict=True)
        return torch.stack([(a - b).abs().mean() / b.abs().mean() for a, b in pairs])

    def result(self) -> dict[str, Any]:
        """Return the stack's entry of the calibration."""
        pairs = numpy.concatenate([rows.reshape(-1, 2) for rows in self.rows().values()])
        if len(pairs) < LEAST_PAIRS:
            raise ValueError(
                f"calibrate: a polynomial needs at least {LEAST_PAIRS} steps after the first, got "
                f"{len(pairs)}; run more steps or more requests inside the with block"
            )
        coefficients = numpy.polyfit(pairs[:, 0], pairs[:, 1], DEGREE)
        return {"coefficients": coefficients.tolist(), "pairs": len(pairs)}


Recorder = Magnitudes | Changes

RECORDERS: dict[str, type[Recorder]] = {"magcache": Magnitudes, "teacache": Changes}


def record(transformers: Sequence[Sequence[Any]], policy: str) -> list[Recorder]:
    """Make the stacks of an enabled transformer note their steps from now on.

    Args:
        transformers: the stacks of each transformer.
        policy: that the calibration is for.

    Raises:
        ValueError: there are several transformers, or it is not known yet what is cached.
    """
    if len(transformers) != 1:
        raise ValueError(
            f"calibrate: the target must have one transformer, got {len(transformers)}; calibrate "
            f"each by itself (as in calibrate(pipe.transformer, ...)) and give each its file by a "
            f"ParamsModifier"
        )
    stacks = [stack for stack in transformers[0] if stack.entries]
    if not stacks:
        raise ValueError(
            "calibrate: the transformer must have blocks to skip that are known before the first "
            "forward, got none; name forward_pattern in the BlockAdapter"
        )
    for stack in stacks:
        stack.recorder = RECORDERS[policy](stack)
    return [stack.recorder for stack in stacks]


def calibration_of(policy: str, recorders: list[Recorder]) -> dict[str, Any]:
    """Return the content of the calibration; raises as `rows` and `result` of the recorders."""
    stacks = {recorder.stack.name: recorder.result() for recorder in recorders}
    runs = next(iter(recorders[0].runs.values()))
    # the blocks are what counts: a transformer may hold them in a module of another class
    model = type(recorders[0].stack.lists[0].owner).__name__
    return new_calibration(policy, model, len(runs[0]) + 1, stacks)
