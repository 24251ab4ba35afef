"""One block stack of a transformer: its guards, its lanes, and the step that is under way."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dbcache.adapters.blocks.block_list import BlockList, Entry
from dbcache.adapters.blocks.patterns import ENCODER, STREAMS, ForwardPattern, Streams, describe
from dbcache.adapters.signals.measurements import Source, make_source
from dbcache.adapters.stacks.last_blocks import Tail, new_lane_tail
from dbcache.adapters.stacks.proxies import (
    CheckGuard,
    FirstGuard,
    MiddleEndGuard,
    MiddleGuard,
    ProbeEndGuard,
)
from dbcache.config.cache import DBCacheConfig, ParamsModifier, StackSettings
from dbcache.config.checks import prepare
from dbcache.graphs.recording import Cutter, Decision
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.kernels.decision.decide import decide
from dbcache.lanes import eager
from dbcache.lanes.following import FollowedDecision, FollowingLane
from dbcache.lanes.lane import Lane, Layout, layout_of
from dbcache.lanes.plan import check_retention, resolve_mask
from dbcache.lanes.predictors import check_runs_on_device, check_steps_are_known
from dbcache.lanes.sharding import Sharding
from dbcache.lanes.shared_change import SharedChange

if TYPE_CHECKING:
    from dbcache.adapters.signals.recorders import CalibrationNotes


class Stack:
    """Blocks that share one decision: one list, or a chain of lists that follow one another.

    Args:
        lists: the chain, in the order in which the forward runs it.
        pattern: what the blocks take and return.
        settings: checked settings; Fn and Bn are clamped to the number of blocks, with a warning.
        streams: names of the parameters that take hidden states and encoder states.
        interleaved: the forward runs a block of each list in turn, and rearranges the tokens in
            between (Latte: spatial, temporal). Fn and Bn count rounds. The middle ends after the
            first block of its last round: it gives back the arrangement that it got.
        leader: the stack whose decisions this one takes over, without a probe of its own: Fn is 0.
    """

    def __init__(
        self,
        lists: list[BlockList],
        pattern: ForwardPattern,
        settings: StackSettings,
        streams: Streams = STREAMS,
        interleaved: bool = False,
        leader: Stack | None = None,
    ) -> None:
        self.lists = lists
        self.round = len(lists) if interleaved else 1
        self.pattern = pattern
        self.streams = streams
        self.leader = leader
        self.name = "+".join(block_list.path for block_list in lists)
        self.settings = prepare(settings, lists[0].owner, self.name)
        self._given = settings.cache
        self.fn, self.bn = self._clamp()
        self.lanes: dict[str | None, Lane] = {}
        self.tail: Tail | None = None
        self.entries = self._make_entries()
        self.calibration_notes: CalibrationNotes | None = None
        self.source: Source | None = None
        if leader is None:
            first = lists[0]
            self.source = make_source(self.settings, self.name, first.owner, first.blocks[0])
        self._learned = False
        self._copies_probe = True
        self._copies_middle = True
        self._originals: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.shared = SharedChange(self.settings.cache)
        self.cutter: Cutter | None = None
        self.sharding: Sharding | None = None  # where the ranks each have a part of the tokens
        self.forget_step()

    @property
    def num_blocks(self) -> int:
        """How many blocks all lists have."""
        return sum(len(block_list.blocks) for block_list in self.lists)

    def _clamp(self) -> tuple[int, int]:
        """Return Fn and Bn as they can be run."""
        cache, total = self.settings.cache, self.num_blocks
        fn = min(self.round * cache.probe_blocks, total) if self.leader is None else 0
        bn = min(self.round * (cache.Bn_compute_blocks + 1) - 1, total - fn)
        if fn + bn == total:
            wanted = f"Fn={cache.probe_blocks}, Bn={cache.Bn_compute_blocks}"
            warnings.warn(
                f"{self.name}: {wanted} leaves none of the {total} blocks to skip; runs Fn={fn}, "
                f"Bn={bn}: every block on every step. Lower Fn_compute_blocks to cache here",
                stacklevel=2,
            )
        return fn, bn

    def _make_entries(self) -> list[list[Entry]]:
        """Return what stands for each list, on the first forward."""
        if self.fn + self.bn == self.num_blocks:
            return []
        self.tail = Tail.of(self)
        for lane in self.lanes.values():  # of blocks that were exchanged
            lane.tail = new_lane_tail(self, lane.device)
        return self._rows()

    def _rows(self) -> list[list[Entry]]:
        """Return a row per list of what `_entry` makes of its blocks."""
        positions = itertools.count()
        return [
            [
                self._entry(
                    index * self.round + turn if self.round > 1 else next(positions),
                    block,
                    f"{block_list.path}[{index}] ({type(block).__name__})",
                )
                for index, block in enumerate(block_list.blocks)
            ]
            for turn, block_list in enumerate(self.lists)
        ]

    @property
    def makes_encoder(self) -> bool:
        """Whether the encoder stream is something that blocks only return."""
        return ENCODER not in self.pattern.takes and ENCODER in self.pattern.returns

    def _entry(self, position: int, block: torch.nn.Module, who: str) -> Entry:
        """Return what stands for the block at `position` of the stack."""
        first, last = self.fn, self.num_blocks - self.bn - 1
        if first <= position <= last:
            if position in (first, last):
                return MiddleEndGuard(self, block, who, position == first, position == last)
            return MiddleGuard(self, block, who)
        if position > last and self.tail is not None:
            return self.tail.run.guard(self, position - self.tail.start, block, who)
        if position == first - 1 and self.makes_encoder:
            return ProbeEndGuard(self, block, who, is_first=position == 0)
        return (FirstGuard if position == 0 else CheckGuard)(self, block, who)

    def forget_step(self) -> None:
        """Drop what belongs to the step under way."""
        self.lane: Lane | None = None
        self.branch: str | None = None
        self.cached = False
        self.is_open = False
        self.is_branch = False
        self.prediction: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.h_in: torch.Tensor | None = None
        self.h_fn: torch.Tensor | None = None
        self.passed: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.encoder_fn: torch.Tensor | None = None
        if self.tail is not None:
            self.tail.run.forget_step()

    def start_request(self) -> None:
        """Forget the last request."""
        self.shared.start_request()
        if self.source is not None:
            self.source.start_request()
        for lane in self.lanes.values():
            lane.start_request()

    def plan_request(self, steps: int | None) -> None:
        """Fit plan and predictor to a request of `steps` steps (None: unknown).

        Raises:
            ValueError: it does not fit, or it needs the number of steps.
        """
        mask = resolve_mask(self._given, steps, self.name)
        check_retention(self._given, steps, self.name)
        check_steps_are_known(self.settings.predictor, steps, self.name)
        is_new = mask != self.settings.cache.steps_computation_mask
        if not is_new and steps == self.settings.steps:
            return
        self.settings = replace(self.settings, steps=steps)
        if is_new:
            # the number of steps has done its part: it must not be compared with the mask again
            changes = DBCacheConfig(steps_computation_mask=mask, num_inference_steps=None)
            self.settings = self.settings.modified(ParamsModifier(cache_config=changes))
        for lane in self.lanes.values():
            lane.replan(self.settings)

    def forget(self, branch: str | None) -> bool:
        """Make the next step of a branch a full one; say whether it could have been cached."""
        lane = self.lanes.get(branch)
        if lane is None or not lane.has_reference:
            return False
        lane.forget_reference()
        return True

    @property
    def recorded(self) -> tuple[object, ...]:
        """What recorded work depends on."""
        form = (self.name, self.pattern, self.streams, self.round, self.leader is None)
        tail = () if self.tail is None else (self.tail.start, *self.tail.run.prunable)
        return (*form, self.fn, self.bn, *tail, *self.settings.recorded)

    def inherit(self, old: Stack) -> None:
        """Take over the lanes of another stack, whose `recorded` is the same, for a new request."""
        self.lanes, self.shared = old.lanes, old.shared
        for lane in self.lanes.values():
            lane.reload(self.settings)
            lane.start_request()

    def start_step(self, branch: str | None) -> None:
        """Prepare for a forward; take up blocks that were exchanged since the last one."""
        self.branch = branch
        if any(block_list.current() != block_list.blocks for block_list in self.lists):
            for block_list in self.lists:
                block_list.blocks = block_list.current()
            self.fn, self.bn = self._clamp()
            self.entries = self._make_entries()
            self._learned, self._copies_probe, self._copies_middle = False, True, True
            for lane in self.lanes.values():
                lane.forget_reference()

    def prepare_recording(self) -> None:
        """Get ready for steps that are recorded as graphs; raise a ValueError if they cannot be."""
        self.check_recordable()
        self.shared.by_device = True

    def check_recordable(self) -> None:
        """Raise a ValueError if the stack's steps cannot be recorded as graphs."""
        check_runs_on_device(self.settings.predictor, self.name)

    def notice_call(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Take note of what the transformer is called with."""
        if self.cutter is not None:
            self.check_recordable()
        if self.source is not None:
            self.source.start(model, args, kwargs, may_read=self.cutter is None)

    def notice_output(self, output: Any) -> None:
        """Take note of what the transformer returns."""
        if self.source is not None and self.lane is not None:
            self.source.finish(self.lane, output, self.cached)
        if self.calibration_notes is not None:
            self.calibration_notes.after_forward(output)

    def begin(self, h_in: torch.Tensor) -> None:
        """Take note of what the first block gets."""
        self._check_stream(h_in)
        if self.sharding is not None:
            h_in = self.sharding.split_input(f"{self.lists[0].path}.0", h_in)
        copies = self._copies_probe and not self.settings.cache.compares_hidden_states
        self.h_in = h_in.clone() if copies else h_in
        if not self._learned:
            self._originals = [(h_in, self.h_in)]

    def _check_stream(self, hidden: object) -> None:
        """Raise if what the first block gets is no tensor."""
        if not isinstance(hidden, torch.Tensor):
            raise TypeError(
                f"{self.name}: hidden_states must be a tensor, got {describe(hidden)}; blocks that "
                f"take something else need a patch_functor, see BlockAdapter"
            )

    def decide(self, h_fn: torch.Tensor, encoder_in: torch.Tensor | None) -> None:
        """Take the step's decision. Called with what the first middle block gets."""
        if self.fn == 0:
            self._check_stream(h_fn)
            if self.sharding is not None:  # the block itself is given all, and takes its part
                first = f"{self.lists[0].path}.0"
                h_fn = self.sharding.split_input(first, h_fn)
                if encoder_in is not None:
                    encoder_in = self.sharding.split_input(first, encoder_in, ENCODER)
            self.h_in = h_fn
        if self.h_in is None:
            return  # the model left the first block out: all others run
        if self.pattern is ForwardPattern.Pattern_2:
            encoder_in = None
        elif ENCODER not in self.pattern.takes:
            encoder_in = self.encoder_fn
        if h_fn.shape != self.h_in.shape:
            raise ValueError(
                f"{self.name}: hidden_states must keep their shape through the probe blocks, got "
                f"{tuple(self.h_in.shape)} before and {tuple(h_fn.shape)} after them; choose an "
                f"Fn_compute_blocks within which the shape stays"
            )
        if not self._learned:
            self._copies_probe = self._were_overwritten()
        lane = self.lanes.get(self.branch)
        if lane is None:
            lane = self.lanes[self.branch] = self._new_lane(h_fn.device)
        self.cached = self._take_decision(lane, h_fn, layout_of(h_fn, encoder_in))
        self.lane = lane
        self.is_open = True
        if self.cached and encoder_in is None and lane.encoder_ring is not None:
            encoder_in = h_fn.new_zeros(lane.encoder_ring.shape[1:])  # made by the blocks alone
        self.passed = h_fn, encoder_in
        copies = self._copies_middle and not self.cached
        self.h_fn = h_fn.clone() if copies else h_fn
        self.encoder_fn = encoder_in.clone() if copies and encoder_in is not None else encoder_in
        if self.cached:
            # now, since the loop may write into what passes through (Chroma adds its ControlNet so)
            self.prediction = eager.forecast(lane, self.h_fn, self.encoder_fn)
        if not self._learned:
            self._originals = [(h_fn, self.h_fn)]
            if encoder_in is not None and self.encoder_fn is not None:
                self._originals.append((encoder_in, self.encoder_fn))

    def _new_lane(self, device: torch.device) -> Lane:
        self.shared.prepare(device)
        if self.leader is None:
            lane = Lane(self.settings, device, branch=self.branch)
        else:
            lane = FollowingLane(self.settings, self._leader_lane())
        lane.tail = new_lane_tail(self, device)
        return lane

    def _leader_lane(self) -> Lane:
        """Return the lane that has taken this step's decision."""
        assert self.leader is not None
        if self.leader.lane is None:
            raise RuntimeError(
                f"{self.name}: with decision_scope='model' the first stack must run before the "
                f"others, got a forward in which {self.leader.name} has not; name the stacks in "
                f"the order of the forward, or use decision_scope='stack'"
            )
        return self.leader.lane

    def _take_decision(self, lane: Lane, h_fn: torch.Tensor, layout: Layout) -> bool:
        """Decide the step of `lane`, or take over what the leader decided."""
        if isinstance(lane, FollowingLane):
            return self._follow(lane, layout, h_fn.device)
        assert self.h_in is not None
        compared = h_fn
        if self.source is not None:
            compared = self.source.measured()
            layout = (*layout, compared.shape, compared.dtype)
        serves_all = self.cutter is not None and not self.cutter.fixed_by_plan
        if serves_all:
            lane.check_has_run(layout, self.name)
        code = lane.start_step(layout, h_fn.device)
        is_open = code == PlanCode.DYNAMIC and lane.has_reference
        is_branch = serves_all or (self.cutter is not None and is_open)
        if is_branch:
            self.check_needs_no_vote()
        if not (is_branch or is_open):
            decide(lane.state, None)
        elif (self.shared.is_on or self._votes) and lane.p_ref is not None:
            decide(lane.state, self._measure(lane, compared))
        else:
            eager.enqueue_decision(lane, self.h_in, compared)
        cached = not is_branch and eager.settle(lane, code)
        if self.source is not None:
            lane.remember(compared)
        if is_branch:
            self._begin_branch(eager.LaneDecision(lane))
        return cached

    @property
    def _votes(self) -> bool:
        """Whether a rank measures only its part of the tokens."""
        return self.sharding is not None and (self.source is None or not self.source.is_whole)

    def check_needs_no_vote(self) -> None:
        """Raise if the decision needs a message, which a recording would not repeat in time."""
        if self.sharding is not None:
            raise RuntimeError(
                f"{self.name}: a step whose decision the ranks of a sequence vote on cannot be "
                f"captured, got one under capture; run it outside of the graph, or use tp_size"
            )

    def _follow(self, lane: FollowingLane, layout: Layout, device: torch.device) -> bool:
        """Take over what the leader decided; a branch, where that is one."""
        lane.leader = self._leader_lane()
        assert self.leader is not None
        if not self.leader.is_branch:
            return lane.follow(layout, device)
        assert self.cutter is not None
        if self.cutter.fixed_by_plan:
            lane.follow(layout, device)
        else:
            lane.check_has_run(layout, self.name)
        self._begin_branch(FollowedDecision(lane))
        return False

    def _begin_branch(self, decision: Decision) -> None:
        """Let what follows be recorded as one of two ways."""
        assert self.cutter is not None
        self.is_branch = True
        self.cutter.begin_full(decision, self.name)

    def _were_overwritten(self) -> bool:
        """Say whether blocks wrote into their inputs, so that a copy is needed from now on."""
        return not all(torch.equal(original, copy) for original, copy in self._originals)

    def _measure(self, lane: Lane, h_fn: torch.Tensor) -> torch.Tensor:
        """Return the change, of all ranks; or that of another branch, as `SharedChange` says."""

        def measure() -> torch.Tensor:
            assert self.h_in is not None
            partials = eager.measure(lane, self.h_in, h_fn)
            if self.sharding is None or not self._votes:
                return partials
            by_sample = self.settings.cache.batch_reduce == "max"
            return self.sharding.vote(partials, per_sample=by_sample)

        records = self.cutter is not None
        return self.shared(self.branch, lane.state, lane.step, h_fn, measure, is_recorded=records)

    def finish_cached(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the predicted output of the middle blocks."""
        assert self.prediction is not None
        self.is_open = False
        if self.tail is not None:
            self.tail.run.encoder = self.prediction[1]
        return self.prediction

    def finish_full(self, h_out: torch.Tensor, encoder: torch.Tensor | None, who: str) -> None:
        """Store what the middle blocks did."""
        if self.lane is None:
            return  # the model left out the block at which the step is decided
        assert self.h_in is not None
        assert self.h_fn is not None
        if h_out.shape != self.h_fn.shape:
            raise ValueError(
                f"{who}: the middle blocks must keep the shape of hidden_states, got "
                f"{tuple(self.h_fn.shape)} before and {tuple(h_out.shape)} after them; name the "
                f"lists as separate stacks in a BlockAdapter"
            )
        if not self._learned:
            self._copies_middle = self._were_overwritten()
        if self.calibration_notes is not None:
            self.calibration_notes.after_blocks(h_out)
        is_made = self.fn == 0 and self.encoder_fn is None
        if is_made and encoder is not None:
            self.encoder_fn = torch.zeros_like(encoder)  # made by the blocks alone
        eager.keep(self.lane, self.h_in, self.h_fn, h_out, self.encoder_fn, encoder)
        if self.is_branch:
            assert self.cutter is not None
            self.cutter.begin_cached()
            assert self.passed is not None
            h_fn, encoder_fn = self.passed  # what the full body copied, or made, is not there
            if is_made and encoder is not None:
                encoder_fn = torch.zeros_like(encoder)
            eager.forecast_into(self.lane, h_fn, encoder_fn, h_out, encoder)
            self.cutter.end_branch()
        self.is_open = False
        if self.tail is not None:
            self.tail.run.encoder = encoder

    def pruned_blocks(self, branch: str | None) -> list[list[int]] | None:
        """Return the blocks that were left out on each step; None where whole steps are cached."""
        return None

    def left_blocks_out(self) -> bool:
        """Say whether the model did not run the blocks at which a step is decided and stored.

        Raises:
            RuntimeError: it did not run the one at which a cached step is predicted.
        """
        if self.is_open and (self.cached or self.cutter is not None):
            raise RuntimeError(
                f"{self.name}: the model did not run its last middle block, so that the step "
                f"could not be predicted; forwards that leave blocks out on some steps only need "
                f"a branch of their own (cache_context), or the cache off (dbcache.disable)"
            )
        return self.is_open or (bool(self.entries) and self.lane is None)

    def finish_forward(self) -> None:
        """End the step; after the first one, drop what only learning needed."""
        if not self._learned and self.lane is not None:
            self._learned = True
            self._originals = []
            for row in self.entries:
                row[:] = [e.block if type(e) is CheckGuard else e for e in row]
        self.forget_step()

    def count_full_step(self, branch: str | None, device: torch.device) -> None:
        """Count a step that ran without the guards: full, with nothing kept of it."""
        self.branch = branch
        lane = self.lanes[branch] = self._new_lane(device)
        if isinstance(lane, FollowingLane):
            lane.step = lane.leader.step
        else:
            eager.take_decision(lane, lane.plan[0], None)
            lane.forget_reference()
        self.lane = lane

    def abort_forward(self) -> None:
        """Clean up after an exception: the step counts as never begun."""
        if self.lane is not None and self.cutter is None:
            self.lane.abort_step()
        self.forget_step()
