"""A block stack whose middle blocks are skipped as a whole: what all requests share of it."""

from __future__ import annotations

from typing import Any

import torch

from dbcache.adapters.blocks.block_list import Entry
from dbcache.adapters.stacks.base import BlockStack
from dbcache.adapters.stacks.input_copies import InputCopies
from dbcache.adapters.stacks.last_blocks import last_blocks_of
from dbcache.adapters.stacks.proxies import BlockProxy, MiddleBlock, ProbeBlock
from dbcache.adapters.stacks.stack_run import StackRun
from dbcache.adapters.stacks.step import Step
from dbcache.config.cache import StackSettings
from dbcache.lanes.host_lane import HostLane
from dbcache.lanes.lane import Lane
from dbcache.lanes.last_blocks import LaneTail
from dbcache.lanes.predictors import check_runs_on_device


class Stack(BlockStack):
    """Blocks of which the middle ones are skipped together; see `BlockStack` for the arguments."""

    step = Step
    middle: type[BlockProxy] = MiddleBlock

    KNOWN = (*BlockStack.KNOWN, "probe_copies", "middle_copies")

    def make_entries(self) -> list[list[Entry]]:
        self.probe_copies, self.middle_copies = InputCopies(), InputCopies()
        if self.fn + self.bn == self.num_blocks:
            return []
        self.single_blocks = last_blocks_of(self)
        return self.rows()

    def kind_of(self, position: int) -> type[BlockProxy]:
        if position > self.last_middle and self.single_blocks is not None:
            return self.single_blocks.kind_of(position, self)
        if self.is_skipped(position):
            return self.middle
        return ProbeBlock if position == 0 or self.ends_probe(position) else BlockProxy

    def ends_probe(self, position: int) -> bool:
        """Whether what the block at `position` returns is what the change is measured by."""
        return position == self.fn - 1 and (self.makes_encoder or self.round == 1)

    def new_lane(self, run: StackRun, branch: str | None, device: torch.device, step: Any) -> Any:
        leader = None if self.leader is None else self.leader_lane(step.forward)
        if run.is_on_host:
            lane: Lane = HostLane(run.settings, device, branch)
        else:
            lane = Lane(run.settings, device if leader is None else leader.device, branch, leader)
        if self.single_blocks is not None:
            lane.tail = LaneTail(run.settings, self.prunable, device)
        return lane

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
