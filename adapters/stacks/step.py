"""A step: what is under way in one forward of one block stack.

    change = lane.measure(h_in, h_fn)
    cached = lane.decide(change)                         # on the device
    out = lane.predict(h_fn) if cached else run(middle)
    lane.commit(h_in, h_fn, out)                         # full steps

The proxies of the stack call `begin` at the first block, `decide` at the first middle block, and
`finish_cached` or `finish_full` at the last middle block.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dbcache.adapters.blocks.patterns import ENCODER, HIDDEN, describe
from dbcache.adapters.stacks.gradients import Streams, followed
from dbcache.adapters.stacks.last_blocks import LastBlocksStep
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.lanes.buffers import Layout

DYNAMIC = PlanCode.DYNAMIC


class StackStep:
    """The step that a stack takes in one forward, whether its blocks are skipped together or not.

    Args:
        stack: the blocks.
        run: what the request keeps of the stack.
        branch: guidance branch of the call.
        forward: the forward under way, with the steps of all stacks.

    Attributes:
        lane: what is remembered of earlier steps; None until the step is decided.
        cached: blocks are skipped.
        awaits_end: the decision is taken, and the last block that may be skipped has not run yet.
        hides_gradients: the skipped blocks were called where gradients are off, and given what
            needs them, as a reentrant checkpoint does.
        prediction: what the blocks that are skipped would have returned.
        cutter: records the step (a `Cutter`); None: it is not recorded.
    """

    cached = awaits_end = hides_gradients = watches_output = is_conditional = False
    lane: Any = None
    prediction: Streams | None = None

    def __init__(self, stack: Any, run: Any, branch: str | None, forward: Any) -> None:
        self.stack = stack
        self.run = run
        self.branch = branch
        self.forward = forward
        self.cutter: Any = forward.cutter

    def _add_lane(self, device: torch.device) -> Any:
        """Return a lane for the branch, whose first step this is."""
        self.run.shared.prepare(device)
        lane = self.stack.new_lane(self.run, self.branch, device, self)
        self.run.lanes[self.branch] = lane
        return lane

    def _measure(self, lane: Any, of: torch.Tensor) -> torch.Tensor:
        """Return the partial sums of the change that this branch measures."""
        return lane.blocks.measure(of)

    def _change(self, lane: Any, of: torch.Tensor) -> torch.Tensor:
        """Measure the change, or take that of another branch, as `SharedChange` says."""
        own, is_recorded = partial(self._measure, lane, of), self.cutter is not None
        return self.run.shared(self.branch, lane.steps, of, own, is_recorded=is_recorded)

    def check_end(self) -> None:
        """Raise a RuntimeError if the model left out the block at which a step is predicted."""
        predicts = self.cached or self.cutter is not None or self.prediction is not None
        if self.awaits_end and predicts:
            raise RuntimeError(
                f"{self.stack.name}: the model did not run its last middle block, so that the step "
                f"could not be predicted; forwards that leave blocks out on some steps only need a "
                f"branch of their own (cache_context), or the cache off (dbcache.disable)"
            )

    def count_full(self, device: torch.device) -> None:
        """Count a step that ran without the proxies: full, with nothing kept of it."""
        self.lane = lane = self.run.lanes.get(self.branch) or self._add_lane(device)
        if self.stack.leader is not None:
            lane.steps.follow()
        else:
            lane.decide(None)
            lane.steps.advance(False)
            lane.forget_reference()

    def abort(self) -> None:
        """Clean up after an exception: the step counts as never begun."""
        if self.lane is not None and self.cutter is None:
            self.lane.abort()


class Step(StackStep):
    """The step of a stack whose middle blocks are skipped together; see `StackStep`.

    Attributes:
        is_conditional: the step is recorded as two ways, one of which a replay takes.
        h_in: hidden states before the first block, (B, S, D) or of another shape (B, ...).
        h_fn: hidden states before the first middle block.
        encoder_fn: encoder states before the first middle block.
        passed: both of these, as the block is given them; `h_fn` and `encoder_fn` may be copies.
        made: what was predicted, without gradients.
        probe: hidden states that the last probe block returned; None: `h_fn` is measured.
        returned: the same as the model's loop has it, where `probe` is a copy.
        single_blocks: the step of the last blocks, if some of them may be left out.
    """

    h_in: torch.Tensor | None = None
    h_fn: torch.Tensor
    encoder_fn: torch.Tensor | None = None
    passed: Streams
    made: Streams | None = None
    probe: torch.Tensor | None = None
    single_blocks: Any = None
    returned: torch.Tensor | None = None
    _given: torch.Tensor | None = None

    def __init__(self, stack: Any, run: Any, branch: str | None, forward: Any) -> None:
        super().__init__(stack, run, branch, forward)
        self.watches_output = run.source is not None or run.recorder is not None
        if stack.single_blocks is not None:
            self.single_blocks = LastBlocksStep(stack, run)

    def begin(self, h_in: Any) -> None:
        """Keep what the first block is given."""
        stack, run = self.stack, self.run
        if not isinstance(h_in, torch.Tensor):
            check_stream(stack.name, h_in)
        if run.sharding is not None:
            h_in = self._own_part(h_in)
        self._given = h_in
        if run.is_on_host:
            for key in run.keys_of(self.branch):
                run.lanes[key].prefetch()
        copies = stack.probe_copies.are_needed and not run.settings.cache.compares_hidden_states
        self.h_in = h_in.clone() if copies else h_in

    def _own_part(self, stream: Any, name: str = HIDDEN) -> Any:
        """Return this rank's part of what the first block is given: that takes its part itself."""
        if self.run.sharding is None or stream is None:
            return stream
        return self.run.sharding.split_input(f"{self.stack.lists[0].path}.0", stream, name)

    def decide(self, h_fn: torch.Tensor, encoder_in: torch.Tensor | None) -> None:
        """Take the decision, and predict where it is to cache.

        Args:
            h_fn: hidden states that the first middle block is given.
            encoder_in: its encoder states; None where it takes none.
        """
        stack = self.stack
        if stack.fn == 0:
            check_stream(stack.name, h_fn)
            self.h_in = h_fn = self._own_part(h_fn)
            encoder_in = self._own_part(encoder_in, ENCODER)
        if self.h_in is None:
            return  # the model left the first block out: all others run
        if stack.has_own_encoder:
            encoder_in = self.encoder_fn
        if self.returned is not None:
            copies = stack.loops[self.forward.inputs]
            if self.cutter is None:
                copies.learn((self.returned,), (self.probe,))
            if not copies.are_needed:
                self.probe = self.returned
        probe = h_fn if self.probe is None else self.probe
        if probe.shape != self.h_in.shape:
            raise ValueError(
                f"{stack.name}: hidden_states must keep their shape through the probe blocks, got "
                f"{tuple(self.h_in.shape)} before and {tuple(probe.shape)} after them; choose an "
                f"Fn_compute_blocks within which the shape stays"
            )
        if not stack.probe_copies.is_known:
            stack.probe_copies.learn((self._given,), (self.h_in,))
        lane = self.run.lanes.get(self.branch) or self._add_lane(h_fn.device)
        layout: Layout = (h_fn.shape, h_fn.dtype, h_fn.device)
        if probe is not h_fn and probe.shape != h_fn.shape:
            layout += (probe.shape,)
        if encoder_in is not None:
            layout += (encoder_in.shape, encoder_in.dtype)
        self.passed = h_fn, encoder_in
        self.cached = self._decide(lane, h_fn, probe, layout)
        self.lane, self.awaits_end = lane, True
        if not self.cached:
            self.prediction = None
            self.h_fn, self.encoder_fn = stack.middle_copies.of(self.passed)
            return
        if self.run.groups is not None:
            self.run.groups.load(stack.is_skipped)
        if encoder_in is None and lane.history.encoder_snapshots is not None:
            encoder_in = h_fn.new_zeros(lane.history.encoder_snapshots.shape[1:])
            self.passed = h_fn, encoder_in  # made by the blocks alone
        self.encoder_fn = encoder_in
        # now, since the loop may write into what passes through (Chroma adds its ControlNet so)
        self.made = self.prediction = self.prediction or lane.predict(h_fn, encoder_in)
        if h_fn.requires_grad:
            self.prediction = followed(self, self.passed, self.made)

    def _decide(
        self, lane: Any, h_fn: torch.Tensor, measured: torch.Tensor, layout: Layout
    ) -> bool:
        """Decide on the device; return what the host knows of it."""
        if self.stack.leader is not None:
            return self._follow(lane, layout, h_fn.device)
        run, cutter = self.run, self.cutter
        if run.source is not None:
            measured = run.source.measured()
            layout = (*layout, measured.shape, measured.dtype)
        if cutter is not None and not cutter.fixed_by_plan:
            lane.check_has_run(layout, self.stack.name)
        code = lane.begin(layout, h_fn.device)
        is_dynamic = code == DYNAMIC and lane.steps.has_reference
        is_recorded = cutter is not None and (is_dynamic or not cutter.fixed_by_plan)
        if is_recorded:
            run.check_needs_no_vote()
        if not (is_recorded or is_dynamic):
            lane.decide(None)
        elif (run.shared.is_on or run.votes) and lane.history.p_ref is not None:
            lane.decide(self._change(lane, measured))
        else:
            lane.measure_and_decide(self.h_in, measured)
        flag = None
        if is_dynamic and not is_recorded and lane.steps.state.host is None:
            flag = self._predict_ahead(lane)
        cached = not is_recorded and lane.settle(code, flag)
        if run.source is not None:
            lane.history.refer_to(measured)
        if is_recorded:
            self._begin_conditional(lane)
        return cached

    def _predict_ahead(self, lane: Any) -> bool | None:
        """Launch `predict` while the decision travels to the host; return it. None: not here."""
        makes_encoder = self.passed[1] is None and lane.history.encoder_snapshots is not None
        if not lane.may_predict_ahead or self.run.groups is not None or makes_encoder:
            return None
        read = lane.steps.start_read()
        self.prediction = lane.predict(*self.passed)
        return bool(read())

    def _follow(self, lane: Any, layout: Layout, device: torch.device) -> bool:
        """Take over what the leader decided, or record it as two ways, as the leader's was."""
        leader = self.forward.steps[self.stack.leader.index]
        lane.steps.leader = self.stack.leader_lane(self.forward)
        if not leader.is_conditional:
            return lane.settle(lane.begin(layout, device))
        if self.cutter.fixed_by_plan:
            lane.begin(layout, device)
        else:
            lane.check_has_run(layout, self.stack.name)
        self._begin_conditional(lane)
        return False

    def _measure(self, lane: Any, of: torch.Tensor) -> torch.Tensor:
        """Return the partial sums of the change, of all ranks where they vote."""
        run = self.run
        partials = lane.measure(self.h_in, of)
        if run.sharding is None or not run.votes:
            return partials
        return run.sharding.vote(partials, per_sample=run.settings.cache.batch_reduce == "max")

    def _begin_conditional(self, lane: Any) -> None:
        """Let what follows be recorded as one of two ways."""
        self.is_conditional = True
        self.cutter.begin_full(lane.decision(), self.stack.name)

    def finish_cached(self) -> Streams:
        """Return the predicted output of the middle blocks."""
        assert self.prediction is not None
        self.awaits_end = False
        if self.run.groups is not None:
            self.run.groups.free(self.stack.is_skipped)
        if self.single_blocks is not None:
            self.single_blocks.encoder = self.prediction[1]
        return self.prediction

    def finish_full(self, h_out: torch.Tensor, encoder: torch.Tensor | None, who: str) -> None:
        """Store what the middle blocks did, for later steps.

        Args:
            h_out: hidden states that the last middle block returned.
            encoder: its encoder states; None where it returned none.
            who: the block, for errors.
        """
        lane, run = self.lane, self.run
        if lane is None:
            return  # the model left out the block at which the step is decided
        given = self.passed
        if h_out.shape != self.h_fn.shape:
            raise ValueError(
                f"{who}: the middle blocks must keep the shape of hidden_states, got "
                f"{tuple(self.h_fn.shape)} before and {tuple(h_out.shape)} after them; name the "
                f"lists as separate stacks in a BlockAdapter"
            )
        if not self.stack.middle_copies.is_known and self.prediction is None:
            self.stack.middle_copies.learn(given, (self.h_fn, self.encoder_fn))
        if run.recorder is not None:
            run.recorder.on_blocks(self, h_out)
        made = encoder if self.stack.fn == 0 and given[1] is None else None  # by the blocks alone
        encoder_fn = self.encoder_fn if made is None else torch.zeros_like(made)
        probe = None if self.probe is given[0] else self.probe
        lane.commit(self.h_in, self.h_fn, h_out, encoder_fn, encoder, probe)
        if self.is_conditional:
            self.cutter.begin_cached()
            h_fn, encoder_fn = given  # what the full way copied, or made, is not there
            if made is not None:
                encoder_fn = torch.zeros_like(made)
            lane.predict(h_fn, encoder_fn, out=h_out, encoder_out=encoder)
            self.cutter.end_branch()
        self.awaits_end = False
        self.stack.loops[self.forward.inputs].is_seen = True
        if self.single_blocks is not None:
            self.single_blocks.encoder = encoder

    def on_output(self, output: Any) -> None:
        """Let a policy without a probe, or a calibration, see what the transformer returns."""
        run = self.run
        if run.source is not None and self.lane is not None:
            run.source.finish(self.lane, output, self.cached)
        if run.recorder is not None:
            run.recorder.on_output(self, output)


def check_stream(who: str, hidden: object) -> None:
    """Raise a TypeError if what a block is given as hidden states is no tensor."""
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(
            f"{who}: hidden_states must be a tensor, got {describe(hidden)}; blocks that take "
            f"something else need a patch_functor, see BlockAdapter"
        )
