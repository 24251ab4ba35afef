"""What one lane remembers of its full steps: the probe's reference, and snapshots of the residual.

Memory: P_ref and K snapshots of the size of `hidden_states`, plus K of the size of
`encoder_hidden_states` where the blocks return them; K is the predictor's `slots`. P_ref has the
model's dtype, the snapshots that of `cache_dtype`; with fp8 a float32 scale per token is added. A
lane whose steps are decided before the first block has no P_ref.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dbcache.config.cache import StackSettings
from dbcache.kernels.common.lane_state import CACHED, LaneState
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.decision.transformation_rate import transformation_rate
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import predict
from dbcache.lanes.buffers import empty_like, outside_inference_mode, overlap

BUFFERS = (
    "p_ref", "snapshots", "encoder_snapshots", "scales", "encoder_scales",
    "full_input", "full_output",
)  # fmt: skip
"""Attributes of a history that hold its large tensors."""


class History:
    """The large tensors of one lane, allocated at its first full step.

    Args:
        settings: of the stack.
        compares: keep P_ref: not where another lane decides, or where there is no probe.

    Attributes:
        p_ref: what the probe gave at the last full step; without a probe, what was last measured.
        snapshots: (K, *shape of the hidden states); `encoder_snapshots` are those of the encoder.
        scales: of fp8 snapshots, with `encoder_scales`.
        full_input: what the transformer got at the last full step (EasyCache); `full_output` is
            what it returned.
    """

    p_ref: torch.Tensor | None
    snapshots: torch.Tensor | None
    encoder_snapshots: torch.Tensor | None
    scales: torch.Tensor | None
    encoder_scales: torch.Tensor | None
    full_input: torch.Tensor | None
    full_output: torch.Tensor | None

    def __init__(self, settings: StackSettings, compares: bool) -> None:
        cache = settings.cache
        self.compares = compares
        self.by_residual = compares and not cache.compares_hidden_states
        self.by_token = cache.important_condition_threshold > 0
        self.slots = settings.slots
        self.replace = settings.replace
        self.cache_dtype = cache.cache_dtype
        self.take({})

    def take(self, buffers: Mapping[str, torch.Tensor | None]) -> None:
        """Go on with `buffers`; for those that are not there the next full step allocates anew."""
        for name in BUFFERS:
            setattr(self, name, buffers.get(name))

    def buffers_by_name(self) -> dict[str, torch.Tensor | None]:
        """Return the large tensors."""
        return {name: getattr(self, name) for name in BUFFERS}

    def commit(
        self,
        counters: torch.Tensor,
        h_in: torch.Tensor | None,
        h_fn: torch.Tensor,
        h_out: torch.Tensor,
        encoder_fn: torch.Tensor | None,
        encoder_out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Store a full step, as the kernel `commit` does; return the snapshots of both streams."""
        if encoder_fn is None or encoder_out is None:
            encoder_fn = encoder_out = None
        if self.snapshots is None:
            self._allocate(h_fn, h_out, encoder_out)
        assert self.snapshots is not None
        commit(
            h_in if self.by_residual else None,
            h_fn,
            h_out,
            self.p_ref if self.compares else None,
            self.snapshots,
            counters,
            encoder_fn,
            encoder_out,
            self.encoder_snapshots,
            self.scales,
            self.encoder_scales,
            replace=self.replace,
        )
        return self.snapshots, self.encoder_snapshots

    @outside_inference_mode
    def _allocate(
        self, h_fn: torch.Tensor, h_out: torch.Tensor, encoder_out: torch.Tensor | None
    ) -> None:
        if self.compares:
            self.p_ref = empty_like(h_fn)
        self.snapshots, self.scales = self._room_for(h_out)
        if encoder_out is not None:
            self.encoder_snapshots, self.encoder_scales = self._room_for(encoder_out)

    def _room_for(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return room for snapshots of residuals like `x`, and for their scales if it is fp8."""
        shape = (self.slots, *x.shape)
        dtypes = {"model": x.dtype, "float32": torch.float32, "fp8": torch.uint8}
        dtype = dtypes[self.cache_dtype]
        snapshots = torch.empty(shape, dtype=dtype, device=x.device)
        if dtype != torch.uint8:
            return snapshots, None
        return snapshots, torch.empty(shape[:-1], dtype=torch.float32, device=x.device)

    def predict(
        self,
        state: LaneState,
        h_fn: torch.Tensor,
        encoder_fn: torch.Tensor | None,
        out: torch.Tensor | None,
        encoder_out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weighted sum of the snapshots, as the kernel `predict` does.

        Args:
            state: has the weights.
            h_fn: what the skipped blocks would get.
            encoder_fn: the same for the encoder states, if the blocks return them.
            out: the result is written into it, whatever its strides and dtype; it may be `h_fn`,
                or share memory with one of the inputs.
            encoder_out: as `out`, for the encoder states; not written where none were stored.
        """
        assert self.snapshots is not None
        has_encoder = self.encoder_snapshots is not None
        encoder_fn = encoder_fn if has_encoder else None
        is_ready = out is not None and _may_become(out, h_fn, encoder_fn, encoder_out)
        is_encoder_ready = (
            encoder_out is not None
            and encoder_fn is not None
            and _may_become(encoder_out, encoder_fn, h_fn, out)
        )
        hidden, encoder = predict(
            h_fn,
            self.snapshots,
            state.weights,
            encoder_fn,
            self.encoder_snapshots,
            state.encoder_weights if has_encoder else None,
            self.scales,
            self.encoder_scales,
            out=out if is_ready else None,
            encoder_out=encoder_out if is_encoder_ready else None,
            replace=self.replace,
        )
        if out is not None and not is_ready:
            hidden = out.copy_(hidden)
        if encoder_out is not None and encoder is not None and not is_encoder_ready:
            encoder = encoder_out.copy_(encoder)
        return hidden, encoder

    @outside_inference_mode
    @torch.no_grad()
    def remember(self, measured: torch.Tensor) -> None:
        """Keep what this step measured, for the next one; for policies without a probe."""
        if self.p_ref is None:
            self.p_ref = empty_like(measured)
        self.p_ref.copy_(measured)

    @outside_inference_mode
    @torch.no_grad()
    def record_output(self, state: LaneState, output: torch.Tensor) -> None:
        """Measure how the output of a full step followed its input, and keep both (EasyCache).

        On a cached step nothing is changed. Which of them it was is seen on the device.
        """
        now_in = self.p_ref
        assert now_in is not None
        if self.full_input is None or self.full_output is None:
            self.full_input, self.full_output = empty_like(now_in), empty_like(output)
        moved_out = probe_diff(None, self.full_output, output)
        moved_in = probe_diff(None, self.full_input, now_in)
        transformation_rate(state, moved_out, moved_in)
        cached = state.counters[CACHED : CACHED + 1] != 0
        for kept, now in ((self.full_input, now_in), (self.full_output, output)):
            torch.where(cached, kept, now, out=kept)

    def nbytes(self) -> int:
        """Bytes of the large tensors."""
        return sum(x.nbytes for x in self.buffers_by_name().values() if x is not None)


def _may_become(out: torch.Tensor, x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the kernel may write what is predicted from `x` into `out`: see `predict`."""
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        return False
    is_same = out.data_ptr() == x.data_ptr() and x.is_contiguous()
    if not out.is_contiguous() or (overlap(out, x) and not is_same):
        return False
    return not any(other is not None and overlap(out, other) for other in others)
