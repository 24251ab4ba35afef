"""One lane: the steps of one block stack under one guidance branch, and what they remember.

Memory per lane: P_ref and K ring slots of the size of `hidden_states`, plus K slots of the size
of `encoder_hidden_states` where the blocks return them; K is the predictor's order + 1. P_ref has
the model's dtype, the ring that of `cache_dtype`; with fp8 a float32 scale per token is added.
"""

from __future__ import annotations

import torch

from dbcache.config import StackSettings
from dbcache.kernels import lane_state
from dbcache.kernels.lane_state import BatchReduce, LaneState, PlanCode
from dbcache.schedule import make_plan

FIRST_CAPACITY = 64
"""Steps that a lane has room for at first; it grows when a request is longer."""

Layout = tuple[object, ...]
"""Shapes, dtypes and device of a step's tensors; a change of it restarts the lane."""

outside_inference_mode = torch.inference_mode(False)
"""Lanes outlive a call: a tensor made in inference mode could not be written to outside of it."""


class Lane:
    """Device state and buffers of one lane, and the host's view of where it stands."""

    compares = True
    """Whether the lane keeps P_ref; without it another lane takes the decisions."""

    @outside_inference_mode
    def __init__(
        self, settings: StackSettings, device: torch.device, state: LaneState | None = None
    ) -> None:
        self.settings = settings
        self.by_residual = not settings.cache.compares_hidden_states
        self.by_token = settings.cache.important_condition_threshold > 0
        self.device = device
        self.step = 0
        self.has_reference = False
        self.cached = False
        self.layout: Layout | None = None
        self.p_ref: torch.Tensor | None = None
        self.ring: torch.Tensor | None = None
        self.encoder_ring: torch.Tensor | None = None
        self.scales: torch.Tensor | None = None
        self.encoder_scales: torch.Tensor | None = None
        self.state = LaneState.allocate(FIRST_CAPACITY, device) if state is None else state
        self._flag: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None
        if state is None:
            self._load_settings()

    def _load_settings(self) -> None:
        """Write the parameters and the plan to the device."""
        cache, state = self.settings.cache, self.state
        order, encoder_order = self.settings.orders
        limits = torch.zeros_like(state.limits, device="cpu")
        limits[lane_state.MAX_CACHED] = cache.max_cached_steps
        limits[lane_state.MAX_CONSECUTIVE] = cache.max_continuous_cached_steps
        limits[lane_state.SLOTS] = self.settings.slots
        limits[lane_state.ORDER] = order
        limits[lane_state.ENCODER_ORDER] = encoder_order
        limits[lane_state.BATCH_REDUCE] = BatchReduce[cache.batch_reduce.upper()]
        limits[lane_state.PREDICTOR] = self.settings.calibrator.predictor
        state.limits.copy_(limits)
        thresholds = torch.zeros_like(state.thresholds, device="cpu")
        thresholds[lane_state.THRESHOLD] = cache.threshold
        accumulated = cache.max_accumulated_residual_diff_threshold
        thresholds[lane_state.MAX_ACCUMULATED] = accumulated or 0.0
        thresholds[lane_state.IMPORTANT] = cache.important_condition_threshold
        thresholds[lane_state.HERMITE_SCALE] = self.settings.calibrator.hermite_scale
        state.thresholds.copy_(thresholds)
        self._write_plan()

    def _write_plan(self) -> None:
        self.plan = make_plan(self.settings.cache, len(self.state.plan))
        self.state.plan.copy_(torch.tensor(self.plan, dtype=torch.int32))

    @outside_inference_mode
    def replan(self, settings: StackSettings) -> None:
        """Take over settings that differ in the mask."""
        self.settings = settings
        self._write_plan()

    def start_request(self) -> None:
        """Forget the last request; the buffers stay allocated."""
        self.step = 0
        self.has_reference = False
        self.cached = False
        self.state.reset()

    def start_step(self, layout: Layout, device: torch.device) -> PlanCode:
        """Make room for the step and return its plan code; restart if the `layout` changed."""
        if layout != self.layout:
            if device != self.device:
                self._move(device)
            if self.has_reference:
                self.state.invalidate()
                self.has_reference = False
            self.drop_buffers()
            self.layout = layout
        if self.step >= len(self.plan):
            self._grow()
        return self.plan[self.step]

    @outside_inference_mode
    def _grow(self) -> None:
        """Make room for twice the steps."""
        self.state.grow(2 * len(self.plan))
        self._write_plan()

    @outside_inference_mode
    def _move(self, device: torch.device) -> None:
        """Take the scalar state along to another device."""
        old, self.device = self.state, device
        self.state = LaneState.allocate(len(old.plan), device)
        self.state.copy_(old)
        self._flag = self._event = None

    def drop_buffers(self) -> None:
        """Let go of what no longer fits; the next full step allocates anew."""
        self.p_ref = self.ring = self.encoder_ring = None
        self.scales = self.encoder_scales = None

    def buffers(
        self, h_fn: torch.Tensor, h_out: torch.Tensor, encoder_out: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Return (P_ref, ring, encoder ring), allocated at the first full step, with the scales."""
        if self.ring is None:
            return self._allocate(h_fn, h_out, encoder_out)
        return self.p_ref, self.ring, self.encoder_ring

    @outside_inference_mode
    def _allocate(
        self, h_fn: torch.Tensor, h_out: torch.Tensor, encoder_out: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        if self.compares:
            self.p_ref = torch.empty(h_fn.shape, dtype=h_fn.dtype, device=h_fn.device)
        self.ring, self.scales = self._allocate_ring(h_out)
        if encoder_out is not None:
            self.encoder_ring, self.encoder_scales = self._allocate_ring(encoder_out)
        return self.p_ref, self.ring, self.encoder_ring

    def _allocate_ring(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a ring for residuals like `x`, and its scales if it is fp8."""
        shape = (self.settings.slots, *x.shape)
        dtypes = {"model": x.dtype, "float32": torch.float32, "fp8": torch.uint8}
        dtype = dtypes[self.settings.cache.cache_dtype]
        ring = torch.empty(shape, dtype=dtype, device=x.device)
        if dtype != torch.uint8:
            return ring, None
        return ring, torch.empty(shape[:-1], dtype=torch.float32, device=x.device)

    def read_decision(self) -> bool:
        """Return whether the device decided to cache. The only host wait of a dynamic step."""
        if self.state.host is not None:
            return bool(self.state.host[0][lane_state.CACHED])
        flag = self.state.counters[lane_state.CACHED : lane_state.CACHED + 1]
        if self._flag is None or self._event is None:
            self._flag = torch.empty(1, dtype=torch.int32, pin_memory=True)
            self._event = torch.cuda.Event()
        self._flag.copy_(flag, non_blocking=True)
        self._event.record(torch.cuda.current_stream(self.device))
        self._event.synchronize()
        return bool(self._flag)

    def forget_reference(self) -> None:
        """Make the next step a full one: nothing that was stored holds any more."""
        self.has_reference = False
        self.state.invalidate()
        self.state.counters[lane_state.REFERENCE] = 0

    def abort_step(self) -> None:
        """Undo a step that an exception cut short: it counts as never begun."""
        self.step -= 1
        self.forget_reference()
        self.state.counters[lane_state.STEP] = self.step
        if self.cached:
            self.state.counters[lane_state.CACHED_STEPS] -= 1

    def trace(self) -> tuple[list[int], list[float]]:
        """Read back the reasons and the diffs (-1: not measured) of this request's steps."""
        return (
            self.state.trace_reason[: self.step].tolist(),
            self.state.trace_diff[: self.step].tolist(),
        )

    def nbytes(self) -> int:
        """Bytes of the lane's buffers."""
        buffers = (self.p_ref, self.ring, self.encoder_ring, self.scales, self.encoder_scales)
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)
