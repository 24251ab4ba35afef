"""One lane of DBPrune: what is stored of each block, and which blocks of a step are left out.

The step's own rules (plan, limits) are arithmetic on counts that the host has anyway: it reads
once per undecided step which blocks are left out. What is compared, and the decision on each block,
are on the device.

Memory per lane: two tensors of the size of `hidden_states` per block between the first and the last
one that may be left out, and one of the size of `encoder_hidden_states` where blocks return them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from dbcache.config import StackSettings
from dbcache.kernels import lane_state as ls
from dbcache.kernels.add_residuals import add_residuals
from dbcache.kernels.block_changes import block_changes
from dbcache.kernels.block_state import BlockState
from dbcache.kernels.decide import choose
from dbcache.kernels.decide_blocks import decide_blocks
from dbcache.kernels.lane_state import PlanCode, Reason
from dbcache.kernels.store_block import store_block
from dbcache.lane import FIRST_CAPACITY, Layout, outside_inference_mode
from dbcache.prune_config import DBPruneConfig
from dbcache.schedule import make_plan
from dbcache.sharding import Sharding


class BlockCache:
    """What is stored of a run of blocks.

    Args:
        prunable: which of them may be left out.
        rule: the numbers of `block_state` that `decide_blocks` goes by.
    """

    def __init__(self, prunable: Sequence[bool], rule: Sequence[float]) -> None:
        self.prunable = list(prunable)
        self.rule = list(rule)
        self.layout: Layout | None = None
        self.is_complete = False
        self.state: BlockState | None = None
        self._host: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def fit(self, layout: Layout) -> bool:
        """Drop what is stored of tensors of another `layout`; say whether there was any."""
        if layout == self.layout:
            return False
        had_any, self.is_complete = self.is_complete, False
        self.layout, self.state, self._host, self._event = layout, None, None, None
        return had_any

    def measure(self, h: torch.Tensor) -> torch.Tensor:
        """Return the partial sums of how much each block's input changed, given the first one's."""
        assert self.state is not None
        return block_changes(h, self.state.inputs, self.state.residuals, self.state.stamps)

    def decide(
        self, partials: torch.Tensor, sharding: Sharding | None = None
    ) -> tuple[list[bool], list[float]]:
        """Return which blocks are left out, and the changes. The only host wait of a step.

        Args:
            partials: what `measure` gave.
            sharding: ranks that each have a part of the tokens decide alike, by one message.
        """
        assert self.state is not None
        state = self.state
        if sharding is not None:
            blocks, samples = partials.shape[:2]
            sums = torch.cat([partials.sum(2).flatten(0, 1), state.growth_sums.sum(1)])
            sums = sharding.vote(sums[:, None], per_sample=True)
            partials = sums[: blocks * samples].unflatten(0, (blocks, samples))
            state = dataclasses.replace(state, growth_sums=sums[blocks * samples :])
        decide_blocks(partials, state)
        pairs = self._read(state.decisions).tolist()
        return [bool(skipped) for _, skipped in pairs], [diff for diff, _ in pairs]

    def _read(self, decisions: torch.Tensor) -> torch.Tensor:
        if not decisions.is_cuda:
            return decisions
        if self._host is None or self._event is None:
            self._host = torch.empty(decisions.shape, pin_memory=True)
            self._event = torch.cuda.Event()
        self._host.copy_(decisions, non_blocking=True)
        self._event.record(torch.cuda.current_stream(decisions.device))
        self._event.synchronize()
        return self._host

    def store(
        self,
        index: int,
        step: int,
        h_in: torch.Tensor,
        h_out: torch.Tensor,
        encoder_in: torch.Tensor | None,
        encoder_out: torch.Tensor | None,
    ) -> None:
        """Store what block `index` was given and added."""
        if encoder_in is None or encoder_out is None:
            encoder_in = encoder_out = None
        if self.state is None:
            self._allocate(h_in, encoder_in)
        assert self.state is not None
        streams = (h_in, h_out, encoder_in, encoder_out)
        store_block(self.state, index, step, *streams, first=not self.is_complete)

    @outside_inference_mode
    def _allocate(self, h: torch.Tensor, encoder: torch.Tensor | None) -> None:
        self.state = BlockState.allocate(h, encoder, self.prunable, self.rule)

    def replace(
        self, first: int, count: int, h: torch.Tensor, encoder: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what blocks `first` to ``first + count - 1`` would have made of the streams."""
        assert self.state is not None
        added = self.state.encoder_residuals
        if encoder is None or added is None:
            h, _ = add_residuals(h, self.state.residuals, first, count)
            return h, encoder
        return add_residuals(h, self.state.residuals, first, count, encoder, added)

    def nbytes(self) -> int:
        """Bytes of the stored streams."""
        return 0 if self.state is None else self.state.nbytes


class PrunedLane:
    """The steps of one block stack under one guidance branch.

    Args:
        settings: with a `DBPruneConfig`.
        prunable: which blocks may be left out, from the first of them to the last.
        num_blocks: blocks of the whole stack.
    """

    def __init__(self, settings: StackSettings, prunable: Sequence[bool], num_blocks: int) -> None:
        assert isinstance(settings.cache, DBPruneConfig)
        self.settings = settings
        self.config = settings.cache
        self.num_blocks = num_blocks
        self.cache = BlockCache(prunable, self.config.rule)
        self._limits = [0] * ls.NUM_LIMITS
        self._limits[ls.MAX_CACHED] = self.config.max_steps
        self._limits[ls.MAX_CONSECUTIVE] = self.config.max_continuous_cached_steps
        self._thresholds = [0.0] * ls.NUM_THRESHOLDS
        self._thresholds[ls.THRESHOLD] = self.config.threshold
        self.plan = make_plan(self.config, FIRST_CAPACITY, settings.steps)
        self.start_request()

    def replan(self, settings: StackSettings) -> None:
        """Take over settings that differ in the mask."""
        assert isinstance(settings.cache, DBPruneConfig)
        self.settings, self.config = settings, settings.cache
        self.plan = make_plan(self.config, len(self.plan), settings.steps)

    def start_request(self) -> None:
        """Forget the last request; the buffers stay allocated."""
        self.step = 0
        self.cached = False
        self.cache.is_complete = False
        self._counters = [0] * ls.NUM_COUNTERS
        self.reasons: list[Reason] = []
        self.skipped: list[list[bool]] = []
        self.block_diffs: list[list[float]] = []

    def start_step(self, layout: Layout) -> PlanCode:
        """Return the step's plan code; what is stored is dropped if the `layout` changed."""
        if self.cache.fit(layout):
            self._counters[ls.REFERENCE] = 2
        if self.step >= len(self.plan):
            self.plan = make_plan(self.config, 2 * len(self.plan), self.settings.steps)
        return self.plan[self.step]

    def why(self, code: PlanCode) -> Reason | None:
        """Return what decides the step without a look at the changes; None where they do."""
        zeros = [0.0] * ls.NUM_VALUES
        reason = choose(self._counters, zeros, self._limits, self._thresholds, code, None)
        return None if reason is Reason.NAN else reason

    def close(self, reason: Reason | None, skipped: list[bool], diffs: list[float]) -> None:
        """Count the step. `reason` is that of `why`; None: what the changes decided."""
        if reason is None and any(skipped):
            always = self.config.threshold >= 1
            reason = Reason.THRESHOLD_ALWAYS if always else Reason.BELOW_THRESHOLD
        elif reason is None:
            is_nan = all(map(math.isnan, diffs))
            reason = Reason.NAN if is_nan else Reason.ABOVE_THRESHOLD
        self.cached = reason.cached
        self._counters[ls.CACHED_STEPS] += self.cached
        self._counters[ls.CONSECUTIVE] = (self._counters[ls.CONSECUTIVE] + 1) * self.cached
        self._counters[ls.REFERENCE] = 1
        self.reasons.append(reason)
        self.skipped.append(skipped)
        self.block_diffs.append(diffs)
        self.step += 1

    def stores(self) -> bool:
        """Whether the blocks that run on the step just closed are to be stored."""
        interval = self.config.residual_cache_update_interval
        return not self.cache.is_complete or (self.step - 1) % interval == 0

    @property
    def has_reference(self) -> bool:
        """Whether blocks could be left out on the next step."""
        return self.cache.is_complete

    def forget_reference(self) -> None:
        """Make the next step a full one: nothing that was stored holds any more."""
        self.cache.is_complete = False
        self._counters[ls.REFERENCE] = 0

    def abort_step(self) -> None:
        """Undo a step that an exception cut short: it counts as never begun."""
        self.step -= 1
        self._counters[ls.CACHED_STEPS] -= self.cached
        for trace in (self.reasons, self.skipped, self.block_diffs):
            trace.pop()
        self.forget_reference()

    def trace(self) -> tuple[list[int], list[float]]:
        """Return the reasons, and per step the smallest change of a block that may be left out
        (-1: not measured)."""
        diffs = []
        for step in self.block_diffs:
            pairs = zip(step, self.cache.prunable, strict=False)
            known = [diff for diff, prunable in pairs if prunable and not math.isnan(diff)]
            diffs.append(min(known) if known else (math.nan if step else -1.0))
        return [int(reason) for reason in self.reasons], diffs

    def nbytes(self) -> int:
        """Bytes of the lane's buffers."""
        return self.cache.nbytes()
