"""A block stack whose middle blocks are skipped as a whole: what all requests share of it."""

from __future__ import annotations

from typing import Any

import torch

from dbcache.adapters.blocks.block_list import Entry
from dbcache.adapters.signals.measurements import Source, make_source
from dbcache.adapters.stacks.base import BlockStack
from dbcache.adapters.stacks.input_copies import InputCopies
from dbcache.adapters.stacks.last_blocks import LastBlocks
from dbcache.adapters.stacks.proxies import (
    BlockProxy,
    Boundary,
    CheckedBlock,
    ProbeEnd,
    ProbeStart,
    SkippedBlock,
)
from dbcache.adapters.stacks.stack_run import StackRun
from dbcache.adapters.stacks.step import Step
from dbcache.config.cache import StackSettings
from dbcache.lanes.host_lane import HostLane
from dbcache.lanes.lane import Lane
from dbcache.lanes.predictors import check_runs_on_device


class Stack(BlockStack):
    """Blocks of which the middle ones are skipped together; see `BlockStack` for the arguments."""

    step = Step
    boundary: type[BlockProxy] = Boundary
    middle: type[BlockProxy] = SkippedBlock

    last_blocks: LastBlocks | None = None

    def make_entries(self) -> list[list[Entry]]:
        self.probe_copies, self.middle_copies = InputCopies(), InputCopies()
        if self.fn + self.bn == self.num_blocks:
            return []
        self.last_blocks = LastBlocks.of(self)
        return self.rows()

    def entry(self, position: int, block: torch.nn.Module, who: str) -> Entry:
        first, last = self.fn, self.last_middle
        if position > last and self.last_blocks is not None:
            return self.last_blocks.proxy(position, block, who)
        kind: type[BlockProxy] = CheckedBlock
        if first <= position <= last:
            kind = self.boundary if position in (first, last) else self.middle
        elif position == first - 1 and (self.makes_encoder or self.round == 1):
            kind = ProbeEnd
        elif position == 0:
            kind = ProbeStart
        return kind(self, block, who, position)

    @property
    def geometry(self) -> tuple[object, ...]:
        last = self.last_blocks
        which = () if last is None else (last.start, *last.blocks.prunable)
        return (*super().geometry, *which)

    def inherit(self, old: Any) -> None:
        super().inherit(old)
        self.last_blocks = old.last_blocks
        self.probe_copies, self.middle_copies = old.probe_copies, old.middle_copies

    def make_source(self) -> Source | None:
        if self.leader is not None:
            return None
        first = self.lists[0]
        return make_source(self.settings, self.name, first.owner, first.blocks[0])

    def new_lane(self, run: StackRun, branch: str | None, device: torch.device, step: Any) -> Any:
        run.shared.prepare(device)
        leader = None if self.leader is None else self.leader_lane(step.forward)
        if run.is_on_host:
            lane: Lane = HostLane(run.settings, device, branch)
        else:
            lane = Lane(run.settings, device if leader is None else leader.device, branch, leader)
        lane.tail = self.new_tail(run.settings, device)
        return lane

    def new_tail(self, settings: StackSettings, device: torch.device) -> Any:
        """Return what a new lane keeps of the last blocks; None where all of them run."""
        return None if self.last_blocks is None else self.last_blocks.new_store(settings, device)

    def fits(self, lane: Any) -> bool:
        """Whether what a lane keeps of the last blocks fits them."""
        own = None if self.last_blocks is None else self.last_blocks.blocks.prunable
        return own == (None if lane.tail is None else lane.tail.blocks.prunable)

    def leader_lane(self, forward: Any) -> Any:
        """Return the lane that has taken the decision of this forward."""
        assert self.leader is not None
        lane = forward.steps[self.leader.index].lane
        if lane is None:
            raise RuntimeError(
                f"{self.name}: with decision_scope='model' the first stack must run before the "
                f"others, got a forward in which {self.leader.name} has not; name the stacks in "
                f"the order of the forward, or use decision_scope='stack'"
            )
        return lane

    def check_recordable(self, settings: StackSettings) -> None:
        check_runs_on_device(settings.predictor, self.name)
        if settings.cache.cache_device == "cpu":
            raise ValueError(
                f"{self.name}: steps recorded as CUDA graphs must have their residuals on the GPU, "
                f"got cache_device='cpu'; leave out one of them"
            )
