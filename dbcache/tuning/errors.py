"""How much a cached call changes the final latents, for each full call that it could reuse.

    E[t, s] = S_t * g * (output of call t with the residual of call s  -  output of call t)

S_t is the response of the final latents to the model's output at the step of call t, the scheduler
run by itself on an impulse; g is the part that the call's output has in what the scheduler is
given (guidance). What the weights w of a schedule leave is then, to first order, the sum over
cached calls of sum_j w_j E[t, s_j]: errors of several calls may cancel, or add up. E is measured,
not modelled: a cached call runs no block, so that all pairs together cost as much as a few full
calls.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import dbcache
from dbcache.adapters.signals.measurements import first_tensor
from dbcache.tuning.progress import quietly
from dbcache.tuning.recording import Call, Recorded, Store

MOST_POINTS = 4096
"""Numbers that are kept of an error: as many entries of the latents, chosen at random."""

REACH = 48
"""Calls back from which a residual may be reused."""

Lane = tuple[int, str | None]
"""Index of the transformer, and guidance branch."""


@dataclass(frozen=True)
class Pairs:
    """The errors of one picture.

    Attributes:
        index: row of each (lane, call, full call).
        rows: (pairs, points), float32.
    """

    index: dict[tuple[Lane, int, int], int]
    rows: torch.Tensor


def scheduler_response(recorded: Recorded) -> list[float]:
    """Return how much the final latents follow the model's output, per step of the scheduler.

    The scheduler is linear in the outputs, so a run on one impulse per step tells; where it is not
    to be had, or draws noise, all steps count alike.
    """
    count = len(recorded.steps)
    if recorded.scheduler is None or count > 256:
        return [1.0] * count
    try:
        found = [_run(recorded, at) for at in range(count)]
        rest = _run(recorded, None)
    except Exception as error:  # any scheduler may refuse what it was not made for
        warnings.warn(
            f"tune: the scheduler cannot be run by itself, all steps count alike: {error}",
            stacklevel=2,
        )
        return [1.0] * count
    response = [x - rest for x in found]
    is_usable = all(map(math.isfinite, response)) and any(response)
    return response if is_usable else [1.0] * count


def _run(recorded: Recorded, impulse: int | None) -> float:
    scheduler = copy.deepcopy(recorded.scheduler)
    first = recorded.steps[0]
    x = torch.zeros((1,) * first.sample_dims, dtype=torch.float64, device="cpu")
    for at, step in enumerate(recorded.steps):
        output = torch.full_like(x, float(at == impulse))
        result = scheduler.step(output, step.timestep, x, **step.kwargs)
        x = (result[0] if isinstance(result, tuple) else result.prev_sample).double().cpu()
    return float(x.flatten()[0])


def parts_of_outputs(recorded: Recorded) -> dict[tuple[Lane, int], list[float]]:
    """Return the part of each call's output in what the scheduler is given, per chunk of a batch.

    Guidance adds up outputs of branches, in one batch or in calls of their own; least squares over
    the entries tells with which factors. Outputs of another size count fully.
    """
    by_step: dict[int, list[tuple[Lane, int, Call]]] = {}
    for lane, calls in recorded.calls.items():
        for number, call in enumerate(calls):
            by_step.setdefault(call.scheduler_step, []).append((lane, number, call))
    found: dict[tuple[Lane, int], list[float]] = {}
    for step, entries in by_step.items():
        given = recorded.steps[step].output if step < len(recorded.steps) else None
        columns, owners = [], []
        for lane, number, call in entries:
            found[lane, number] = [1.0]
            if given is None or call.output.numel() % given.numel():
                continue
            chunks = call.output.numel() // given.numel()
            found[lane, number] = [0.0] * chunks
            for chunk, part in enumerate(call.output.reshape(chunks, -1)):
                columns.append(part.double().cpu().numpy())
                owners.append((lane, number, chunk))
        if columns and given is not None:
            matrix = np.stack(columns, 1)
            factors = np.linalg.lstsq(matrix, given.double().cpu().numpy().ravel(), rcond=1e-9)[0]
            for (lane, number, chunk), factor in zip(owners, factors, strict=True):
                found[lane, number][chunk] = float(factor)
    return found


class Replayer:
    """Runs recorded calls again with the residual of another call in place of their blocks.

    Args:
        target: what was recorded; the cache is on from `open` to `close`.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self._step = 0

    def __enter__(self) -> Replayer:
        dbcache.enable(
            self.target,
            steps_computation_mask=[1],
            steps_computation_policy="static",
            static_skip_probe=True,
        )
        self._request = dbcache.start_request(self.target)
        return self

    def __exit__(self, *_: object) -> None:
        self._request.close()
        dbcache.disable(self.target)

    def _call(self, lane: Lane, call: Call) -> torch.Tensor:
        handle, _ = self._request._pairs[lane[0]]
        name = f"{lane[0]} {lane[1]}"
        self._step += 1
        with self._request.branch(name, step_index=self._step):
            return first_tensor("tune", handle.module(*call.args, **call.kwargs))

    def start(self, lane: Lane, call: Call) -> None:
        """Run a call in full, which makes room for residuals."""
        self._call(lane, call)
        _, request = self._request._pairs[lane[0]]
        runs = request.lane_set.runs
        self._histories = [run.lanes[f"{lane[0]} {lane[1]}"].history for run in runs]

    def output(self, lane: Lane, call: Call, source: Call) -> torch.Tensor:
        """Return what a call gives with the residuals of `source`."""
        for history, (hidden, encoder) in zip(self._histories, source.residuals, strict=True):
            Store.get(hidden, history.snapshots[0])
            if encoder is not None:
                Store.get(encoder, history.encoder_snapshots[0])
        return self._call(lane, call)


@quietly()
@torch.no_grad()
def measure_pairs(target: Any, recorded: Recorded) -> Pairs:
    """Return the errors of one picture, over all pairs of calls of each lane."""
    response, parts = scheduler_response(recorded), parts_of_outputs(recorded)
    index: dict[tuple[Lane, int, int], int] = {}
    rows: list[torch.Tensor] = []
    points: torch.Tensor | None = None
    with Replayer(target) as replayer:
        for lane, calls in recorded.calls.items():
            replayer.start(lane, calls[0])
            _check(replayer, lane, calls)
            for t in range(1, len(calls)):
                call = calls[t]
                step = call.scheduler_step
                gain = response[step] if step < len(response) else 1.0
                factors = parts[lane, t]
                for s in range(max(0, t - REACH), t):
                    change = (replayer.output(lane, call, calls[s]) - call.output).float()
                    chunks = change.reshape(len(factors), -1)
                    error = sum(f * gain * c for f, c in zip(factors, chunks, strict=True))
                    assert isinstance(error, torch.Tensor)
                    if points is None:
                        points = _points(error.numel()).to(error.device)
                    scale = math.sqrt(error.numel() / len(points))
                    index[lane, t, s] = len(rows)
                    rows.append((error[points % error.numel()] * scale).cpu())
    return Pairs(index, torch.stack(rows))


def _points(size: int) -> torch.Tensor:
    """Return the entries that are kept, the same for every picture of a size."""
    if size <= MOST_POINTS:
        return torch.arange(size, dtype=torch.int64, device="cpu")
    generator = torch.Generator().manual_seed(size)
    return torch.randperm(size, dtype=torch.int64, generator=generator, device="cpu")[:MOST_POINTS]


def _check(replayer: Replayer, lane: Lane, calls: list[Call]) -> None:
    """Raise if a call with its own residual does not give its own output."""
    call = calls[-1]
    again = replayer.output(lane, call, call)
    error = (again - call.output).float().norm() / call.output.float().norm().clamp_min(1e-12)
    if not error < 0.05:
        raise RuntimeError(
            f"tune: a call that is repeated with its own residual must give its output, got one "
            f"that differs by {float(error):.1%}; the transformer keeps something from call to "
            f"call, or what is drawn runs it under autocast: tune inside of it, too"
        )
