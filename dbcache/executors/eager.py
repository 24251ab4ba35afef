"""The eager executor: the host launches the kernels and reads one flag per dynamic step.

Steps that the plan fixes (warm-up, mask) never wait for the device.
"""

from __future__ import annotations

import torch

from dbcache.kernels.commit import commit
from dbcache.kernels.decide import decide
from dbcache.kernels.lane_state import PlanCode
from dbcache.kernels.predict import predict
from dbcache.kernels.probe_and_decide import probe_and_decide
from dbcache.kernels.probe_diff import probe_diff
from dbcache.lane import Lane


def measure_and_decide(lane: Lane, h_in: torch.Tensor, h_fn: torch.Tensor) -> bool:
    """Measure and decide the lane's next step, a dynamic one with a reference; return the decision.

    What `take_decision` does with what `measure` gives, in one launch.
    """
    assert lane.p_ref is not None
    before = h_in if lane.by_residual else None
    probe_and_decide(before, h_fn, lane.p_ref, lane.state, by_token=lane.by_token)
    lane.step += 1
    lane.cached = lane.read_decision()
    return lane.cached


def measure(lane: Lane, h_in: torch.Tensor, h_fn: torch.Tensor) -> torch.Tensor:
    """Return the partial sums of the probe's change since the lane's last full step."""
    assert lane.p_ref is not None
    before = h_in if lane.by_residual else None
    return probe_diff(before, h_fn, lane.p_ref, lane.state.thresholds if lane.by_token else None)


def take_decision(lane: Lane, code: PlanCode, partials: torch.Tensor | None) -> bool:
    """Decide the lane's next step on the device; return whether it is cached.

    Args:
        lane: its state is updated and its step counted.
        code: the step's plan code.
        partials: what `measure` gave, None where nothing is to be compared.
    """
    decide(lane.state, partials)
    lane.step += 1
    if not lane.has_reference or code in (PlanCode.WARMUP, PlanCode.MASK):
        lane.cached = False
    elif code == PlanCode.STATIC:
        lane.cached = True
    else:
        lane.cached = lane.read_decision()
    return lane.cached


def forecast(
    lane: Lane, h_fn: torch.Tensor, encoder_fn: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what the skipped blocks would have made of `h_fn` and `encoder_fn`."""
    assert lane.ring is not None
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
    lane.has_reference = True
