"""A block stack under DBPrune, whose blocks are left out one by one, and its step."""

from __future__ import annotations

from typing import Any

import torch

from dbcache.adapters.blocks.block_list import Entry
from dbcache.adapters.stacks.base import BlockStack
from dbcache.adapters.stacks.proxies import BlockProxy
from dbcache.adapters.stacks.prunable_blocks import PrunableBlocks, SingleBlocksStep
from dbcache.adapters.stacks.stack_run import StackRun
from dbcache.adapters.stacks.step import StackStep, check_stream
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.lanes.buffers import layout_of
from dbcache.lanes.pruned_lane import PrunedLane
from dbcache.notices import say


class PrunedStack(BlockStack):
    """Blocks that are left out one by one.

    Its settings have a `DBPruneConfig`, and no predictor; see `BlockStack` for the arguments.

    Raises:
        ValueError: there is a predictor, or the blocks of several lists take turns.
    """

    def check(self) -> None:
        super().check()
        settings = self.settings
        if settings.slots > 1 or settings.replace:
            raise ValueError(
                f"DBPruneConfig: a block that is left out must add what it last added, got the "
                f"predictor {settings.predictor.strify()}; leave the calibrator out, or use a "
                f"DBCacheConfig"
            )
        if self.round > 1:
            names = ", ".join(block_list.path for block_list in self.lists)
            raise ValueError(
                f"DBPruneConfig: blocks must run list by list, got {names}, which take turns and "
                f"rearrange the tokens in between; use a DBCacheConfig"
            )

        # with long skips the loop takes what a block returns on to a later one: it must be what it
        # would return
        self.fuses = not self.spec.long_skips

    def make_entries(self) -> list[list[Entry]]:
        config: Any = self.settings.cache
        middle = range(self.fn, self.last_middle + 1)
        positions = [i for i in middle if i not in config.non_prune_block_ids]
        if positions:
            self.single_blocks = PrunableBlocks(positions, self.pattern)
            return self.rows()
        if middle:  # else `_clamp` has warned
            say(
                f"{self.name}: non_prune_block_ids={config.non_prune_block_ids} leaves none of "
                f"the {self.num_blocks} blocks to leave out: every block runs on every step"
            )
        return []

    def kind_of(self, position: int) -> type[BlockProxy]:
        assert self.single_blocks is not None
        return self.single_blocks.kind_of(position, self)

    def fits(self, lane: Any) -> bool:
        return lane.blocks.prunable == self.prunable

    def new_lane(self, run: StackRun, branch: str | None, device: torch.device, step: Any) -> Any:
        return PrunedLane(run.settings, self.prunable, device)

    def prepare_recording(self) -> None:
        """Let each block that is left out return what it would have, as it does while recorded."""
        self.fuses = False

    def pruned_blocks(self, lane: Any) -> Any:
        """Return a function that reads the numbers of the blocks left out on each step so far."""
        assert self.single_blocks is not None
        start, pruned = self.single_blocks.start, lane.pruned_snapshot()
        return lambda: [[start + i for i, skips in enumerate(step) if skips] for step in pruned()]


class PrunedStep(SingleBlocksStep, StackStep):
    """The step of a pruned stack in one forward; see `StackStep` for the arguments."""

    @property
    def single_blocks(self) -> PrunedStep:
        """This step: all blocks of the stack are single ones."""
        return self

    def open(self, step: Any, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Take the step's decisions. Called with what the first block gets that may be left out."""
        check_stream(self.stack.name, hidden)
        run, cutter = self.run, self.cutter
        lane = run.lanes.get(self.branch) or self._add_lane(hidden.device)
        code = lane.begin(layout_of(hidden, encoder), hidden.device)
        is_open = code == PlanCode.DYNAMIC and lane.steps.has_reference
        if cutter is not None and (is_open or not cutter.fixed_by_plan):
            # each block is a conditional, whether it runs or not
            run.check_needs_no_vote()
            if lane.blocks.state is None:
                lane.blocks.allocate(hidden, encoder)
            lane.decide(self._change(lane, hidden))
            self.start(lane.blocks, [], lane.state.store, cutter, lane.decisions())
        else:
            known = lane.known()
            change = self._change(lane, hidden) if known is None else None
            lane.decide(change, run.sharding)
            skipped = lane.settle(known)
            self.start(lane.blocks, skipped, lane.state.store if lane.stores() else None)
            self.cached = lane.steps.cached
        self.lane, self.awaits_end = lane, True

    def close(self) -> None:
        super().close()
        self.awaits_end = False
        self.lane.steps.has_reference |= self.due is not None


PrunedStack.step = PrunedStep
