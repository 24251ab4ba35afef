"""The tensors that one lane keeps of its full steps: the probe's reference, and snapshots.

Memory: P_ref and K snapshots of the size of `hidden_states`, plus K of the size of
`encoder_hidden_states` where the blocks return them; K is the predictor's `slots`. P_ref has the
model's dtype, the snapshots that of `cache_dtype`; with fp8 a float32 scale per token is added. A
lane whose steps are decided before the first block has no P_ref.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from dbcache.config.cache import StackSettings
from dbcache.kernels.common.lane_state import CACHED, LaneState
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.decision.transformation_rate import transformation_rate
from dbcache.lanes.buffers import Streams, empty_like, outside_inference_mode
from dbcache.lanes.sharding import Vote


@dataclass(slots=True, eq=False)
class History:
    """The large tensors of one lane; each is None until the first full step."""

    p_ref: torch.Tensor | None = None
    """What the probe gave at the last full step; without a probe, what was last measured."""
    snapshots: torch.Tensor | None = None
    """(K, *shape of the hidden states)"""
    encoder_snapshots: torch.Tensor | None = None
    """(K, *shape of the encoder states)"""
    scales: torch.Tensor | None = None
    """Of fp8 snapshots, float32 (K, *shape without the last size)"""
    encoder_scales: torch.Tensor | None = None
    """As `scales`"""
    full_input: torch.Tensor | None = None
    """What the transformer got at the last full step (EasyCache)"""
    full_output: torch.Tensor | None = None
    """What it returned"""
    latest: tuple[torch.Tensor, ...] = field(default=(), init=False)
    """What `view_latest` returned; empty before"""

    def tensors(self) -> list[torch.Tensor | None]:
        """Return the tensors."""
        return [getattr(self, each.name) for each in fields(self) if each.init]

    def view_latest(self) -> tuple[torch.Tensor, ...]:
        """Return views of the only snapshots of hidden and encoder states, and keep them."""
        rings = (self.snapshots, self.encoder_snapshots)
        self.latest = tuple(ring[0] for ring in rings if ring is not None)
        return self.latest

    @outside_inference_mode
    def allocate(
        self, settings: StackSettings, compared: torch.Tensor | None, made: Streams, **where: Any
    ) -> torch.Tensor:
        """Allocate P_ref and the snapshots; return those of the hidden states.

        Args:
            settings: of the stack.
            compared: what P_ref is like; None without a probe.
            made: what the blocks returned.
            **where: options of `torch.empty` for the snapshots; none: on the device of `made`.
        """
        if compared is not None:
            self.p_ref = empty_like(compared)
        self.snapshots, self.scales = room(settings, made[0], **where)
        if made[1] is not None:
            self.encoder_snapshots, self.encoder_scales = room(settings, made[1], **where)
        return self.snapshots

    @outside_inference_mode
    @torch.no_grad()
    def refer_to(self, measured: torch.Tensor, h_in: torch.Tensor | None = None) -> None:
        """Keep what was measured as the reference: less `h_in`, where that is given."""
        if self.p_ref is None:
            self.p_ref = empty_like(measured)
        self.p_ref.copy_(measured if h_in is None else measured.float() - h_in.float())

    @outside_inference_mode
    @torch.no_grad()
    def record_output(self, state: LaneState, output: torch.Tensor, vote: Vote | None) -> None:
        """Measure how the output of a full step followed its input, and keep both (EasyCache).

        On a cached step nothing is changed. Which of them it was is seen on the device. `vote`
        gives the sums of all ranks, where they vote.
        """
        assert self.p_ref is not None
        if self.full_input is None or self.full_output is None:
            self.full_input, self.full_output = empty_like(self.p_ref), empty_like(output)
        moved_out = probe_diff(None, self.full_output, output)
        moved_in = probe_diff(None, self.full_input, self.p_ref)
        if vote is not None:
            moved_out, moved_in = (vote(x, per_sample=False) for x in (moved_out, moved_in))
        transformation_rate(state, moved_out, moved_in)
        cached = state.counters[CACHED : CACHED + 1] != 0
        torch.where(cached, self.full_input, self.p_ref, out=self.full_input)
        torch.where(cached, self.full_output, output, out=self.full_output)

    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for x in self.tensors() if x is not None)


def room(
    settings: StackSettings, x: torch.Tensor, **where: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return empty snapshots of residuals like `x`, and their scales if they are fp8.

    Args:
        settings: of the stack.
        x: what the blocks returned.
        **where: options of `torch.empty`; none: on the device of `x`.
    """
    where = where or {"device": x.device}
    shape = (settings.slots, *x.shape)
    dtypes = {"model": x.dtype, "float32": torch.float32, "fp8": torch.uint8}
    dtype = dtypes[settings.cache.cache_dtype]
    snapshots = torch.empty(shape, dtype=dtype, **where)
    if dtype != torch.uint8:
        return snapshots, None
    return snapshots, torch.empty(shape[:-1], dtype=torch.float32, **where)
