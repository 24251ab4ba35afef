"""One lane: the steps of one block stack under one guidance branch, and what they remember.

Memory per lane: P_ref and K ring slots of the size of `hidden_states`, plus K slots of the size
of `encoder_hidden_states` where the blocks return them; K is the predictor's `slots`. P_ref has
the model's dtype, the ring that of `cache_dtype`; with fp8 a float32 scale per token is added. A
lane whose steps are decided before the first block has no P_ref.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dbcache.config.cache import StackSettings
from dbcache.config.policies import POLICIES
from dbcache.kernels.common import lane_state
from dbcache.kernels.common.lane_state import BatchReduce, LaneState
from dbcache.lanes.plan import coefficients, decide_ahead, make_plan
from dbcache.lanes.predictors import make_forecaster

if TYPE_CHECKING:
    from dbcache.lanes.last_blocks import LaneTail

FIRST_CAPACITY = 64
"""Steps that a lane has room for at first; it grows when a request is longer."""

BUFFERS = (
    "p_ref", "ring", "encoder_ring", "scales", "encoder_scales", "full_input", "full_output",
)  # fmt: skip
"""Attributes of a lane that hold its large tensors."""

Layout = tuple[object, ...]
"""Shapes, dtypes and device of a step's tensors; a change of it restarts the lane."""

outside_inference_mode = torch.inference_mode(False)
"""Lanes outlive a call: a tensor made in inference mode could not be written to outside of it."""


class HostCopy:
    """Pinned memory of the host, for a few numbers of a GPU that it waits for."""

    def __init__(self) -> None:
        self._held: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Return the content of `x`, of one shape and dtype each time; the next call overwrites it.

        Waits for what was enqueued on the current stream of its GPU, and for nothing else.
        """
        if self._held is None:
            self._held = self._make(x)
        host, event = self._held
        host.copy_(x, non_blocking=True)
        event.record(torch.cuda.current_stream(x.device))
        event.synchronize()
        return host

    @staticmethod
    @outside_inference_mode
    def _make(x: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()


class Lane:
    """Device state and buffers of one lane, and the host's view of where it stands."""

    HOST = ("step", "has_reference", "cached")
    """What the host keeps of a request, besides the plan."""

    compares = True
    """Whether the lane keeps P_ref: not where another lane decides, or where there is no probe."""

    @outside_inference_mode
    def __init__(
        self,
        settings: StackSettings,
        device: torch.device,
        state: LaneState | None = None,
        branch: str | None = None,
    ) -> None:
        self.settings = settings
        self.branch = branch
        self.policy = POLICIES[settings.cache.policy]
        self.compares = self.compares and settings.cache.probe_blocks > 0
        self.by_residual = self.compares and not settings.cache.compares_hidden_states
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
        self.full_input: torch.Tensor | None = None
        self.full_output: torch.Tensor | None = None
        self.state = LaneState.allocate(FIRST_CAPACITY, device) if state is None else state
        self.forecaster = make_forecaster(settings, device)
        self.tail: LaneTail | None = None  # of the stack's last blocks, if some may be left out
        self._flag = HostCopy()
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
        limits[lane_state.PREDICTOR] = self.settings.predictor.kind
        limits[lane_state.SIGNAL] = self.policy.signal
        state.limits.copy_(limits)
        thresholds = torch.zeros_like(state.thresholds, device="cpu")
        thresholds[lane_state.THRESHOLD] = cache.threshold
        accumulated = cache.max_accumulated_residual_diff_threshold
        thresholds[lane_state.MAX_ACCUMULATED] = accumulated or 0.0
        thresholds[lane_state.IMPORTANT] = cache.important_condition_threshold
        thresholds[lane_state.SCALE] = self.settings.predictor.scale
        polynomial = coefficients(cache, self.settings.calibration)
        thresholds[lane_state.POLYNOMIAL : lane_state.NUM_THRESHOLDS] = torch.tensor(
            polynomial, dtype=torch.float32
        )
        state.thresholds.copy_(thresholds)
        self._rule = limits.tolist(), thresholds.tolist()
        self._write_plan()

    def _write_plan(self) -> None:
        settings = self.settings
        self.plan: list[int] = [*make_plan(settings.cache, len(self.state.plan), settings.steps)]
        self._known_changes: dict[int, float] = {}
        if self.policy.measures == "calibration":
            assert settings.calibration is not None
            ratios = settings.calibration.ratios_for(self.branch, settings.steps)
            self.plan, self._known_changes = decide_ahead(self.plan, ratios, *self._rule)
        self.state.plan.copy_(torch.tensor(self.plan, dtype=torch.int32))

    @outside_inference_mode
    def replan(self, settings: StackSettings) -> None:
        """Take over settings that differ in the mask or the number of steps."""
        self.settings = settings
        if self.forecaster is not None:
            self.forecaster.replan(settings.steps)
        self._write_plan()

    @outside_inference_mode
    def reload(self, settings: StackSettings) -> None:
        """Take over settings that need no other buffers and no other `forecaster`."""
        self.settings = settings
        self._load_settings()
        if self.tail is not None:
            self.tail.reload(settings)

    def start_request(self) -> None:
        """Forget the last request; the buffers stay allocated."""
        self.step = 0
        self.has_reference = False
        self.cached = False
        self.state.reset()
        self._forget_tail()

    def _forget_tail(self) -> None:
        if self.tail is not None:
            self.tail.forget()

    def start_step(self, layout: Layout, device: torch.device) -> int:
        """Make room for the step and return its plan code; restart if the `layout` changed."""
        if layout != self.layout:
            if device != self.device:
                self._move(device)
            self.take_buffers(layout, {})
        if self.step >= len(self.plan):
            self.reserve(2 * len(self.plan))
        return self.plan[self.step]

    def check_has_run(self, layout: Layout, who: str) -> None:
        """Raise a RuntimeError if no step of this `layout` has left behind what later ones need."""
        if layout != self.layout or self.ring is None:
            raise RuntimeError(
                f"{who}: a step that is captured to serve all steps must find what they are "
                f"compared with and predicted from, got a lane in which the last step was of "
                f"another shape, or none has run; run a step before the capture"
            )

    @outside_inference_mode
    def reserve(self, steps: int) -> None:
        """Make room for a request of `steps` steps."""
        if steps > len(self.plan):
            self.state.grow(steps)
            self._write_plan()

    @outside_inference_mode
    def _move(self, device: torch.device) -> None:
        """Take the scalar state along to another device."""
        self.state = self.state.clone(device)
        self._move_rest(device)

    @outside_inference_mode
    def _move_rest(self, device: torch.device) -> None:
        """Take along what there is besides state and buffers."""
        self.device = device
        self.forecaster = make_forecaster(self.settings, device)
        if self.tail is not None:
            self.tail.move(device)
        self._flag = HostCopy()

    def set_buffers(self, buffers: dict[str, torch.Tensor | None]) -> None:
        """Go on with `buffers`; for those that are not there the next full step allocates anew."""
        for name in BUFFERS:
            setattr(self, name, buffers.get(name))
        if self.tail is not None:
            self.tail.take_buffers(buffers)

    def buffers(
        self, h_fn: torch.Tensor, h_out: torch.Tensor, encoder_out: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Return (P_ref, ring, encoder ring), allocated at the first full step, with the scales."""
        if self.ring is None:
            return self._allocate(h_fn, h_out, encoder_out)
        return self.p_ref if self.compares else None, self.ring, self.encoder_ring

    @outside_inference_mode
    def _allocate(
        self, h_fn: torch.Tensor, h_out: torch.Tensor, encoder_out: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        if self.compares:
            self.p_ref = torch.empty(h_fn.shape, dtype=h_fn.dtype, device=h_fn.device)
        self.ring, self.scales = self._allocate_ring(h_out)
        if encoder_out is not None:
            self.encoder_ring, self.encoder_scales = self._allocate_ring(encoder_out)
        return self.p_ref if self.compares else None, self.ring, self.encoder_ring

    def buffers_by_name(self) -> dict[str, torch.Tensor | None]:
        """Return the large tensors."""
        tail = {} if self.tail is None else self.tail.buffers_by_name()
        return {name: getattr(self, name) for name in BUFFERS} | tail

    def learned(self) -> list[torch.Tensor]:
        """Return what the predictor keeps besides the ring, and the last blocks."""
        parts = (self.forecaster, self.tail)
        return [x for part in parts if part is not None for x in part.tensors()]

    def take_buffers(self, layout: Layout, buffers: dict[str, torch.Tensor | None]) -> None:
        """Go on with the large tensors of another layout; what they hold is void."""
        if self.has_reference:
            self.state.invalidate()
            self.has_reference = False
        self.layout = layout
        self.set_buffers(buffers)

    def force(self, code: int) -> None:
        """Fix what the next step will be."""
        self.plan[self.step] = code
        self.state.plan[self.step] = code
        if self.tail is not None:
            self.tail.force(code)

    def rewind(self, step: int) -> None:
        """Go back to `step` after an exception: what came since counts as never begun."""
        self.step = step
        self.forget_reference()
        self.state.counters[lane_state.STEP] = step

    def _allocate_ring(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a ring for residuals like `x`, and its scales if it is fp8."""
        shape = (self.settings.slots, *x.shape)
        dtypes = {"model": x.dtype, "float32": torch.float32, "fp8": torch.uint8}
        dtype = dtypes[self.settings.cache.cache_dtype]
        ring = torch.empty(shape, dtype=dtype, device=x.device)
        if dtype != torch.uint8:
            return ring, None
        return ring, torch.empty(shape[:-1], dtype=torch.float32, device=x.device)

    @outside_inference_mode
    @torch.no_grad()
    def remember(self, measured: torch.Tensor) -> None:
        """Keep what this step measured, for the next one; for policies without a probe."""
        self.p_ref = _copy(measured, self.p_ref)

    @outside_inference_mode
    def full_buffers(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input and output of the latest full step; made where there was none yet."""
        assert self.p_ref is not None
        if self.full_input is None or self.full_output is None:
            self.full_input, self.full_output = _like(self.p_ref), _like(output)
        return self.full_input, self.full_output

    @outside_inference_mode
    @torch.no_grad()
    def remember_full(self, output: torch.Tensor) -> None:
        """Keep the step's output and input, which `remember` was given, if it is a full one."""
        assert self.p_ref is not None
        cached = self.state.counters[lane_state.CACHED : lane_state.CACHED + 1] != 0
        before_in, before_out = self.full_buffers(output)
        torch.where(cached, before_in, self.p_ref, out=before_in)
        torch.where(cached, before_out, output, out=before_out)

    def read_decision(self) -> bool:
        """Return whether the device decided to cache. The only host wait of a dynamic step."""
        if self.state.host is not None:
            return bool(self.state.host[0][lane_state.CACHED])
        flag = self.state.counters[lane_state.CACHED : lane_state.CACHED + 1]
        return bool(self._flag.read(flag))

    def forget_reference(self) -> None:
        """Make the next step a full one: nothing that was stored holds any more."""
        self.has_reference = False
        self.state.invalidate()
        self.state.counters[lane_state.REFERENCE] = 0
        self._forget_tail()

    def abort_step(self) -> None:
        """Undo a step that an exception cut short: it counts as never begun."""
        self.step -= 1
        self.forget_reference()
        self.state.counters[lane_state.STEP] = self.step
        if self.cached:
            self.state.counters[lane_state.CACHED_STEPS] -= 1

    def trace(self) -> tuple[list[int], list[float]]:
        """Read back the reasons and the diffs (-1: not measured) of this request's steps."""
        # a graph that the user captured takes steps that the host does not see
        steps = int(self.state.counters[lane_state.STEP])
        diffs = self.state.trace_diff[:steps].tolist()
        for step, change in self._known_changes.items():
            if step < steps:
                diffs[step] = change
        return self.state.trace_reason[:steps].tolist(), diffs

    def nbytes(self) -> int:
        """Bytes of the lane's buffers."""
        own = (getattr(self, name) for name in BUFFERS)
        blocks = 0 if self.tail is None else self.tail.cache.nbytes()
        return blocks + sum(x.nbytes for x in own if x is not None)


def layout_of(h_fn: torch.Tensor, encoder: torch.Tensor | None) -> Layout:
    """Return what must stay the same for a lane's buffers to fit."""
    if encoder is None:
        return (h_fn.shape, h_fn.dtype, h_fn.device)
    return (h_fn.shape, h_fn.dtype, h_fn.device, encoder.shape, encoder.dtype)


def _copy(x: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """Return `buffer` with the content of `x`; made where there is none."""
    return (_like(x) if buffer is None else buffer).copy_(x)


def _like(x: torch.Tensor) -> torch.Tensor:
    """Return a buffer for what is like `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class LaneCopy:
    """What a lane held at one moment, to be put back into the same tensors."""

    @outside_inference_mode
    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.state = lane.state.clone()
        self.host = {name: getattr(lane, name) for name in lane.HOST}
        self.plan = list(lane.plan)
        self.buffers = {k: x.clone() for k, x in lane.buffers_by_name().items() if x is not None}
        self.learned = [x.clone() for x in lane.learned()]

    @outside_inference_mode
    def restore(self) -> None:
        """Put everything back."""
        lane = self.lane
        lane.state.copy_(self.state)
        for name, value in self.host.items():
            setattr(lane, name, value)
        lane.plan[:] = self.plan
        for name, buffer in lane.buffers_by_name().items():
            if buffer is not None and name in self.buffers:
                buffer.copy_(self.buffers[name])
        for tensor, content in zip(lane.learned(), self.learned, strict=True):
            tensor.copy_(content)
