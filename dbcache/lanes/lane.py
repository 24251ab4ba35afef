"""One lane: the steps of one block stack under one guidance branch, and their history."""

from __future__ import annotations

from typing import Any

import torch

from dbcache.config.cache import StackSettings
from dbcache.config.policies import POLICIES
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import BatchReduce, LaneState
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import predict
from dbcache.kernels.pruning.block_state import BlockState
from dbcache.lanes.buffers import Layout, can_write, outside_inference_mode, written
from dbcache.lanes.decision import Decision, decisions_on_blocks
from dbcache.lanes.following import FollowedSteps, Leader
from dbcache.lanes.forms import Forms, returned_as, widened
from dbcache.lanes.history import History
from dbcache.lanes.last_blocks import LaneTail
from dbcache.lanes.plan import coefficients
from dbcache.lanes.predictors import make_forecaster
from dbcache.lanes.scheduled import make_guard
from dbcache.lanes.step_state import FIRST_CAPACITY, StepState

NOTHING_STORED = (
    "a step that is captured to serve all steps must find what they are compared with and "
    "predicted from, got a lane in which the last step was of another shape, or none has run; run "
    "a step before the capture"
)


Made = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states and encoder states, None where there are none."""


def rule_of(settings: StackSettings) -> tuple[dict[int, int], dict[int, float]]:
    """Return the limits and thresholds of `settings`, by their entries in a `LaneState`."""
    cache = settings.cache
    order, encoder_order = settings.orders
    limits = {
        ls.MAX_CACHED: cache.max_cached_steps,
        ls.MAX_CONSECUTIVE: cache.max_continuous_cached_steps,
        ls.SLOTS: settings.slots,
        ls.ORDER: order,
        ls.ENCODER_ORDER: encoder_order,
        ls.BATCH_REDUCE: BatchReduce.MAX if cache.batch_reduce == "max" else BatchReduce.MEAN,
        ls.PREDICTOR: settings.predictor.kind,
        ls.SIGNAL: POLICIES[cache.policy].signal,
    }
    thresholds = {
        ls.THRESHOLD: cache.threshold,
        ls.MAX_ACCUMULATED: cache.max_accumulated_residual_diff_threshold or 0.0,
        ls.IMPORTANT: cache.important_condition_threshold,
        ls.SCALE: settings.predictor.scale,
    }
    polynomial = coefficients(cache, settings.calibration)
    return limits, thresholds | dict(enumerate(polynomial, ls.POLYNOMIAL))


def added(
    streams: Made, residuals: tuple[torch.Tensor, ...], into: tuple[torch.Tensor | None, ...]
) -> Made:
    """Do what `predict` does where the only weight is 1: add the residuals to the streams.

    PyTorch's addition gives the same bits, and takes less time on the host.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return added(streams, residuals, into)
    h_fn, encoder_fn = streams
    hidden = torch.add(h_fn.contiguous(), residuals[0], out=into[0])
    if encoder_fn is None:
        return hidden, None
    return hidden, torch.add(encoder_fn.contiguous(), residuals[1], out=into[1])


class LaneBase:
    """What a lane does with all that it keeps, whatever the step: to go back, and to forget."""

    steps: StepState[Any] | FollowedSteps
    tail: LaneTail | None = None

    def start_request(self) -> None:
        """Forget the last request; the buffers stay allocated."""
        self.steps.start_request()
        self._forget_tail()

    def force(self, code: int) -> None:
        """Fix the plan code of the next step."""
        self.steps.force(code)
        if self.tail is not None:
            self.tail.force(code)

    def forget_reference(self) -> None:
        """Make the next step a full one: everything stored is void."""
        self.steps.forget()
        self._forget_tail()

    def rewind(self, step: int) -> None:
        """Go back to `step` after an exception; later steps count as never begun."""
        self.steps.rewind(step)
        self._forget_tail()

    def abort(self) -> None:
        """Undo a step after an exception: the step counts as never begun."""
        self.steps.abort()
        self._forget_tail()

    def _forget_tail(self) -> None:
        if self.tail is not None:
            self.tail.forget()


class Lane(LaneBase):
    """One lane, with the verbs of the kernels in the order of a step.

        code   = lane.begin(layout, device)
        lane.decide(lane.measure(h_in, h_fn))             # or lane.measure_and_decide(h_in, h_fn)
        cached = lane.settle(code)
        out, _ = lane.predict(h_fn, None) if cached else ...
        lane.commit(h_in, h_fn, h_out, None, None)        # on full steps

    Args:
        settings: of the stack.
        device: of the blocks.
        branch: of guidance.
        leader: the lane that decides in place of this one, which then only begins, settles,
            predicts and commits.

    Attributes:
        steps: where the lane stands in its request.
        history: its large tensors.
        layout, forms: what they were made for, and in which dtypes.
        reuses: a prediction is the last residual as it is, so that `added` makes it.
        tail: what is kept of the stack's last blocks, if some may be left out.
        tables: of the rows that it was first of in a batch; see `kernels/by_row`.
    """

    @outside_inference_mode
    def __init__(
        self,
        settings: StackSettings,
        device: torch.device,
        branch: str | None = None,
        leader: Leader | None = None,
    ) -> None:
        self.settings = settings
        self.device = device
        self._branch = branch
        self.layout: Layout | None = None
        if leader is None:
            self.steps = StepState(LaneState.allocate(FIRST_CAPACITY, device), branch)
        else:
            self.steps = FollowedSteps(leader)
        cache = settings.cache
        self.compares = leader is None and cache.probe_blocks > 0
        self.by_residual = self.compares and not cache.compares_hidden_states
        self.by_token = cache.important_condition_threshold > 0
        self.replaces = settings.replace
        self.history = History()
        self.forecaster = make_forecaster(settings, device, branch)
        self.guard = make_guard(settings, device, branch)
        self.tables: dict[Any, torch.Tensor] = {}
        self.forms = Forms()
        self._load()

    @property
    def state(self) -> LaneState:
        """The scalars on the device, which a following lane shares with its leader."""
        return self.steps.state

    @property
    def may_predict_ahead(self) -> bool:
        """Whether `predict` may be launched before the host knows the decision."""
        return self.forecaster is None  # else weights are computed for steps known to be cached

    def _load(self) -> None:
        """Write the parameters and the plan to the device."""
        is_reused = not (any(self.settings.predicts) or self.settings.replace)
        self.reuses = is_reused and self.settings.cache.cache_dtype == "model"
        if isinstance(self.steps, StepState):
            self.steps.load(self.settings, *rule_of(self.settings))

    @outside_inference_mode
    def replan(self, settings: StackSettings) -> None:
        """Use settings that differ in the mask or the number of steps."""
        self.settings = settings
        self._refit(settings)
        self.steps.replan(settings)

    def _refit(self, settings: StackSettings) -> None:
        """Tell the predictor and the guard of other settings."""
        for part in (self.forecaster, self.guard):
            if part is not None:
                part.replan(settings)

    @outside_inference_mode
    def reload(self, settings: StackSettings) -> None:
        """Use settings that need no other buffers and no other `forecaster`."""
        self.settings = settings
        self._refit(settings)
        self._load()
        if self.tail is not None:
            self.tail.reload(settings)

    def begin(self, layout: Layout, device: torch.device) -> int:
        """Make room for the next step and return its plan code; restart if the `layout` changed.

        Raises:
            ValueError: the lane follows one on another device.
        """
        changed = layout != self.layout
        code = self.steps.begin(changed, device)
        if changed:
            if device != self.device:
                self._move(device)
            self._take(layout, History(), None)
        if self.guard is not None:
            self.guard.arm(self.state)
        return code

    @outside_inference_mode
    def _move(self, device: torch.device) -> None:
        """Move the predictor and the last blocks to another device."""
        self.device = device
        self.forecaster = make_forecaster(self.settings, device, self._branch)
        self.guard = make_guard(self.settings, device, self._branch)
        if self.tail is not None:
            self.tail.move(device)

    def check_has_run(self, layout: Layout, who: str) -> None:
        """Raise a RuntimeError if no full step of this `layout` has run."""
        if layout != self.layout or self.history.snapshots is None:
            raise RuntimeError(f"{who}: {NOTHING_STORED}")

    def measure(self, h_in: torch.Tensor, h_fn: torch.Tensor) -> torch.Tensor:
        """Return the partial sums of the probe's change since the last full step.

        Args:
            h_in: activations before the probe blocks, (B, ...).
            h_fn: activations behind them; for policies without a probe, what was measured.
        """
        p_ref = self.history.p_ref
        assert p_ref is not None
        dtype = self.forms.hidden if self.compares else h_fn.dtype
        before, h_fn = h_in.to(dtype) if self.by_residual else None, h_fn.to(dtype)
        return probe_diff(before, h_fn, p_ref, self.state.thresholds if self.by_token else None)

    def decide(self, change: torch.Tensor | None) -> None:
        """Decide the next step on the device.

        Args:
            change: what `measure` gave; None where nothing is to be compared.
        """
        decide(self.state, change)

    def measure_and_decide(self, h_in: torch.Tensor, h_fn: torch.Tensor) -> None:
        """Measure and decide in one launch; without a reference there is nothing to measure."""
        p_ref = self.history.p_ref
        if p_ref is None:
            decide(self.state, None)
            return
        dtype = self.forms.hidden if self.compares else h_fn.dtype
        before = h_in if self.by_residual else None
        if before is not None and before.dtype is not dtype:  # a `to` without effect takes time
            before = before.to(dtype)
        if h_fn.dtype is not dtype:
            h_fn = h_fn.to(dtype)
        probe_and_decide(before, h_fn, p_ref, self.steps.state, by_token=self.by_token)

    def settle(self, code: int, flag: bool | None = None) -> bool:
        """Count the step; return the decision, which the host reads only where it is open.

        Args:
            code: what `begin` gave.
            flag: the decision, where it was read already.
        """
        return self.steps.settle(code, flag)

    def decision(self) -> Decision:
        """Return the next decision, for recorded work."""
        return Decision(self.steps.flag(), self.steps.read, self.steps.count)

    def tail_decisions(self) -> list[Decision]:
        """Return the decisions on the last blocks, for recorded work."""
        tail = self.tail
        assert tail is not None
        return decisions_on_blocks(tail.flags, lambda: tail.read(self.steps.cached))

    def predict(
        self,
        h_fn: torch.Tensor,
        encoder_fn: torch.Tensor | None,
        out: torch.Tensor | None = None,
        encoder_out: torch.Tensor | None = None,
    ) -> Made:
        """Return the predicted output of the skipped blocks, for both streams.

        Args:
            h_fn: hidden states before the skipped blocks.
            encoder_fn: encoder states, where the blocks return them.
            out: written in place of a new tensor; any strides, and it may share memory with them.
            encoder_out: as `out`, for the encoder states.
        """
        state, history = self.steps.state, self.history
        assert history.snapshots is not None
        if self.forecaster is not None:
            self.forecaster.weigh(state, self.steps.step - 1)
        forms = self.forms
        if h_fn.dtype is not forms.hidden:
            h_fn = h_fn.to(forms.hidden)
        if history.encoder_snapshots is None:
            encoder_fn = encoder_out = None
        elif encoder_fn is not None:
            if encoder_fn.dtype is not forms.encoder:
                encoder_fn = encoder_fn.to(forms.encoder)
            # its stride is the size of a snapshot, and takes less time than a comparison of shapes
            if encoder_fn.numel() != history.encoder_snapshots.stride(0):
                encoder_fn = widened(encoder_fn, history.encoder_snapshots.shape[1:])
        direct = out is not None and can_write((h_fn, out), (encoder_fn, encoder_out))
        into = (out, encoder_out) if direct else (None, None)
        if self.reuses:
            residuals = history.latest or history.view_latest()
            hidden, encoder = added((h_fn, encoder_fn), residuals, into)
        else:
            hidden, encoder = predict(
                h_fn, history.snapshots, state.weights,
                encoder_fn, history.encoder_snapshots,
                None if encoder_fn is None else state.encoder_weights,
                history.scales, history.encoder_scales,
                out=into[0], encoder_out=into[1], replace=self.replaces,
            )  # fmt: skip
        if out is not None and not direct:
            return written((hidden, encoder), (out, encoder_out))
        return returned_as(forms.returned, hidden, encoder) if forms.returned else (hidden, encoder)

    def commit(
        self,
        h_in: torch.Tensor,
        h_fn: torch.Tensor,
        h_out: torch.Tensor,
        encoder_fn: torch.Tensor | None,
        encoder_out: torch.Tensor | None,
        probe: torch.Tensor | None = None,
    ) -> None:
        """Store P (of `probe`, where given in place of `h_fn`) and R, after a full step."""
        state, steps, history = self.state, self.steps, self.history
        if encoder_fn is None or encoder_out is None:
            encoder_fn = encoder_out = None
        forms = self.forms
        seen = h_out.dtype, None if encoder_out is None else encoder_out.dtype
        if seen != forms.seen and not forms.learn(seen) and history.snapshots is not None:
            self.history = History()  # of another dtype: the next step is a full one
            self.forget_reference()
            return
        dtype = forms.hidden
        if not h_in.dtype is h_fn.dtype is h_out.dtype is dtype:
            h_in, h_fn, h_out = h_in.to(dtype), h_fn.to(dtype), h_out.to(dtype)
        if encoder_fn is not None and encoder_out is not None:
            encoder_fn, encoder_out = encoder_fn.to(forms.encoder), encoder_out.to(forms.encoder)
            if encoder_fn.shape != encoder_out.shape:
                encoder_fn = widened(encoder_fn, encoder_out.shape)
        snapshots = history.snapshots
        if snapshots is None:
            compared = (h_fn if probe is None else probe.to(dtype)) if self.compares else None
            snapshots = history.allocate(self.settings, compared, (h_out, encoder_out))
        p_ref = history.p_ref if self.compares else None
        if probe is not None and p_ref is not None:
            history.refer_to(probe.to(dtype), h_in if self.by_residual else None)
            p_ref = None
        commit(
            h_in if self.by_residual and p_ref is not None else None, h_fn, h_out,
            p_ref, snapshots, state.counters,
            encoder_fn, encoder_out, history.encoder_snapshots,
            history.scales, history.encoder_scales, replace=self.replaces,
        )  # fmt: skip
        if self.forecaster is not None:
            stored = snapshots, history.encoder_snapshots
            self.forecaster.learn(state, stored, steps.step - 1, steps.is_first)
        steps.has_reference = True

    def stored(self) -> tuple[Any, ...]:
        """Return what holds the tensors of the layout, for `take`."""
        return self.history, None if self.tail is None else self.tail.blocks.state

    def take(self, layout: Layout, stored: tuple[Any, ...]) -> None:
        """Continue with what was `stored` for another layout; its content is void."""
        self.steps.invalidate()
        self._take(layout, *stored)

    def _take(self, layout: Layout, history: History, blocks: BlockState | None) -> None:
        self.layout = layout
        self.history = history
        self.forms.take(layout)
        if self.tail is not None:
            self.tail.take(blocks)

    def tensors(self) -> list[torch.Tensor | None]:
        """Return all tensors that a step writes to; None where there is none yet."""
        parts = (self.state, self.history, self.forecaster, self.tail)
        return [x for part in parts if part is not None for x in part.tensors()]

    def nbytes(self) -> int:
        """Bytes of the lane's buffers."""
        return self.history.nbytes() + (0 if self.tail is None else self.tail.blocks.nbytes())
