"""The eager executor: the host launches the kernels and reads one flag per dynamic step.

Steps that the plan fixes (warm-up, mask) never wait for the device.
"""

from __future__ import annotations

import torch

from dbcache.kernels.common.lane_state import CACHED, KNOWN, PlanCode, Reason
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.decision.transformation_rate import transformation_rate
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import predict
from dbcache.lanes.lane import Lane


def enqueue_decision(lane: Lane, h_in: torch.Tensor, h_fn: torch.Tensor) -> None:
    """Measure and decide the lane's next step on the device, and leave it at that."""
    if lane.p_ref is None:  # without a probe the plan says it all
        decide(lane.state, None)
        return
    before = h_in if lane.by_residual else None
    probe_and_decide(before, h_fn, lane.p_ref, lane.state, by_token=lane.by_token)


def settle(lane: Lane, code: int) -> bool:
    """Count a step that the device decides; return the decision, which is only read if it is open.

    Args:
        lane: its step is counted.
        code: the step's plan code, or `KNOWN` plus the reason.
    """
    lane.step += 1
    if not lane.has_reference or code in (PlanCode.WARMUP, PlanCode.MASK):
        lane.cached = False
    elif code == PlanCode.STATIC:
        lane.cached = True
    elif code >= KNOWN:
        lane.cached = Reason(code - KNOWN).cached
    else:
        lane.cached = lane.read_decision()
    return lane.cached


def measure(lane: Lane, h_in: torch.Tensor, h_fn: torch.Tensor) -> torch.Tensor:
    """Return the partial sums of the probe's change since the lane's last full step."""
    assert lane.p_ref is not None
    before = h_in if lane.by_residual else None
    return probe_diff(before, h_fn, lane.p_ref, lane.state.thresholds if lane.by_token else None)


def take_decision(lane: Lane, code: int, partials: torch.Tensor | None) -> bool:
    """Decide the lane's next step on the device; return whether it is cached.

    Args:
        lane: its state is updated and its step counted.
        code: the step's plan code, or `KNOWN` plus the reason.
        partials: what `measure` gave, None where nothing is to be compared.
    """
    decide(lane.state, partials)
    return settle(lane, code)


def note_output(lane: Lane, output: torch.Tensor) -> None:
    """Measure how the output of a full step followed its input, and keep both (EasyCache).

    On a cached step nothing is changed. Which of them it was is seen on the device.
    """
    before_in, before_out = lane.full_buffers(output)
    assert lane.p_ref is not None
    moved_out = probe_diff(None, before_out, output)
    moved_in = probe_diff(None, before_in, lane.p_ref)
    transformation_rate(lane.state, moved_out, moved_in)
    lane.remember_full(output)


def forecast(
    lane: Lane, h_fn: torch.Tensor, encoder_fn: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what the skipped blocks would have made of `h_fn` and `encoder_fn`."""
    assert lane.ring is not None
    if lane.forecaster is not None:
        lane.forecaster.weigh(lane.state, lane.step - 1)
    if lane.encoder_ring is None:
        h_out, _ = predict(
            h_fn,
            lane.ring,
            lane.state.weights,
            scales=lane.scales,
            replace=lane.settings.replace,
        )
        return h_out, None
    return predict(
        h_fn,
        lane.ring,
        lane.state.weights,
        encoder_fn,
        lane.encoder_ring,
        lane.state.encoder_weights,
        lane.scales,
        lane.encoder_scales,
        replace=lane.settings.replace,
    )


def forecast_into(
    lane: Lane,
    h_fn: torch.Tensor,
    encoder_fn: torch.Tensor | None,
    h_out: torch.Tensor,
    encoder_out: torch.Tensor | None,
) -> None:
    """Do as `forecast`, and write the result over what the blocks left."""
    predicted, encoder = forecast(lane, h_fn, encoder_fn)
    h_out.copy_(predicted)
    if encoder_out is not None and encoder is not None:
        encoder_out.copy_(encoder)


def keep(
    lane: Lane,
    h_in: torch.Tensor,
    h_fn: torch.Tensor,
    h_out: torch.Tensor,
    encoder_fn: torch.Tensor | None,
    encoder_out: torch.Tensor | None,
) -> None:
    """Store what later steps are compared with, and a full step's block residual, in the lane."""
    if encoder_fn is None or encoder_out is None:
        encoder_fn = encoder_out = None
    p_ref, ring, encoder_ring = lane.buffers(h_fn, h_out, encoder_out)
    commit(
        h_in if lane.by_residual else None,
        h_fn,
        h_out,
        p_ref,
        ring,
        lane.state.counters,
        encoder_fn,
        encoder_out,
        encoder_ring,
        lane.scales,
        lane.encoder_scales,
        replace=lane.settings.replace,
    )
    if lane.forecaster is not None:
        is_first = not lane.has_reference
        lane.forecaster.learn(lane.state, (ring, encoder_ring), lane.step - 1, is_first)
    lane.has_reference = True


class LaneDecision:
    """A lane's next decision, for recorded work; see `recording.Decision`."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.flag = lane.state.counters[CACHED : CACHED + 1]

    def read(self) -> bool:
        """Count the step and return how it was decided."""
        return settle(self.lane, self.lane.plan[self.lane.step])

    def has_run(self, cached: bool) -> None:
        """A full step has left a reference."""
        if not cached:
            self.lane.has_reference = True

    def count(self) -> None:
        """Count the step; the host does not learn how it was decided."""
        self.lane.step += 1
        self.lane.has_reference = True
        self.lane.cached = False
