"""A lane whose ring lies in host memory: fetched for a step that may be cached, given back after.

    step begins      prefetch: the ring is copied to the device, beside the probe blocks
    step is cached   predict from that copy, then drop it
    step is full     drop it before the blocks run, store into a new one after, copy a slot back

So while blocks run, none of it is on the device. On a GPU the copies have a stream of their own and
the host memory is pinned; on a CPU they are plain copies. P_ref stays on the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from dbcache.config.cache import StackSettings
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.lanes.buffers import Streams, outside_inference_mode
from dbcache.lanes.forms import stored_dtype
from dbcache.lanes.history import History
from dbcache.lanes.lane import Lane

RING = ("snapshots", "scales", "encoder_snapshots", "encoder_scales")
"""The tensors of a history that lie on the host."""


class HostRing:
    """Moves the ring of one lane between host and device.

    Args:
        settings: of the stack.

    Attributes:
        slot: ring slot that the latest full step was stored in.
    """

    def __init__(self, settings: StackSettings) -> None:
        self._settings = settings
        self._copy: History | None = None
        self._stream: torch.cuda.Stream | None = None
        self.slot = 0

    @outside_inference_mode
    def prefetch(self, history: History, device: torch.device) -> None:
        """Begin to copy the ring to the device."""
        if self._copy is not None or history.snapshots is None:
            return
        self._copy = History()
        with self._beside(device):
            for name in RING:
                x = getattr(history, name)
                if x is not None:
                    copy = torch.empty(x.shape, dtype=x.dtype, device=device)
                    setattr(self._copy, name, copy.copy_(x, non_blocking=True))

    def _beside(self, device: torch.device) -> AbstractContextManager[object]:
        """Let copies run beside the work on a GPU, in their own order."""
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return torch.cuda.stream(self._stream)

    def drop(self) -> None:
        """Give the copy back: the step is a full one, or over."""
        self._copy = None

    def fetched(self, history: History, device: torch.device) -> History:
        """Return the copy on the device, for what is enqueued from now on."""
        self.prefetch(history, device)
        copy, self._copy = self._copy, None
        assert copy is not None
        copy.p_ref = history.p_ref
        if self._stream is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(self._stream)
            for name in RING:
                if getattr(copy, name) is not None:
                    getattr(copy, name).record_stream(current)
        return copy

    @outside_inference_mode
    def room_for(
        self,
        history: History,
        compared: torch.Tensor | None,
        made: Streams,
        *,
        is_first: bool,
        whole: bool,
    ) -> History:
        """Return a ring on the device in which a full step is to be stored.

        Args:
            history: whose ring lies on the host; allocated where there is none.
            compared: what P_ref is like; None without a probe.
            made: what the blocks returned.
            is_first: nothing is stored that this goes with.
            whole: with the content of the other slots.
        """
        if history.snapshots is None:
            where = {"device": "cpu", "pin_memory": made[0].is_cuda}
            history.allocate(self._settings, compared, made, **where)
        self.slot = 0 if is_first else (self.slot + 1) % self._settings.slots
        if whole and not is_first:
            return self.fetched(history, made[0].device)
        ring = History(p_ref=history.p_ref)
        ring.allocate(self._settings, None, made)
        return ring

    @outside_inference_mode
    def give_back(self, history: History, ring: History, device: torch.device) -> None:
        """Copy the slot that was stored to the host."""
        with self._beside(device):
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(device))
            for name in RING:
                x = getattr(ring, name)
                if x is not None:
                    getattr(history, name)[self.slot].copy_(x[self.slot], non_blocking=True)
                    if self._stream is not None:
                        x.record_stream(self._stream)


class HostLane(Lane):
    """A lane whose snapshots lie in host memory; see `Lane`.

    Raises:
        ValueError: another lane decides for this one.
    """

    def __init__(self, settings: StackSettings, device: torch.device, branch: str | None) -> None:
        super().__init__(settings, device, branch)
        self.ring = HostRing(settings)

    def prefetch(self) -> None:
        """Begin to fetch the ring, if the step that begins may be a cached one."""
        steps = self.steps
        code = steps.plan[steps.step] if steps.step < len(steps.plan) else PlanCode.DYNAMIC
        if steps.has_reference and code not in (PlanCode.WARMUP, PlanCode.MASK):
            self.ring.prefetch(self.history, self.device)

    @property
    def may_predict_ahead(self) -> bool:
        return False  # a full step would wait for the whole ring

    def settle(self, code: int, flag: bool | None = None) -> bool:
        cached = super().settle(code, flag)
        if not cached:
            self.ring.drop()
        return cached

    def predict(
        self,
        h_fn: torch.Tensor,
        encoder_fn: torch.Tensor | None,
        out: torch.Tensor | None = None,
        encoder_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        own, self.history = self.history, self.ring.fetched(self.history, h_fn.device)
        try:
            return super().predict(h_fn, encoder_fn, out, encoder_out)
        finally:
            self.history = own

    def commit(
        self,
        h_in: torch.Tensor,
        h_fn: torch.Tensor,
        h_out: torch.Tensor,
        encoder_fn: torch.Tensor | None,
        encoder_out: torch.Tensor | None,
        probe: torch.Tensor | None = None,
    ) -> None:
        own, ring, dtype = self.history, self.ring, stored_dtype(h_out.dtype)
        encoder = encoder_out if encoder_fn is not None else None
        encoder = None if encoder is None else encoder.to(stored_dtype(encoder.dtype))
        made = h_out.to(dtype), encoder
        is_first, learns = self.steps.is_first, self.forecaster is not None
        compared = (h_fn if probe is None else probe).to(dtype) if self.compares else None
        where = ring.room_for(own, compared, made, is_first=is_first, whole=learns)
        self.history = where
        try:
            super().commit(h_in, h_fn, h_out, encoder_fn, encoder_out, probe)
        finally:
            self.history = own
        ring.give_back(own, where, h_fn.device)

    def abort(self) -> None:
        self.ring.drop()
        super().abort()

    def host_nbytes(self) -> int:
        """Bytes of those buffers that lie in host memory."""
        held = (getattr(self.history, name) for name in RING)
        return sum(x.nbytes for x in held if x is not None)
