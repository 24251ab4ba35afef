"""A block stack under DBPrune, whose blocks are left out one by one, and its step."""

from __future__ import annotations

from typing import Any

import torch

from dbcache.adapters.blocks.block_list import Entry
from dbcache.adapters.stacks.base import BlockStack
from dbcache.adapters.stacks.prunable_blocks import PrunableBlocks, SingleBlocksStep, trimmed
from dbcache.adapters.stacks.stack_run import StackRun
from dbcache.adapters.stacks.step import StackStep, check_needs_no_vote, check_stream
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.lanes.buffers import layout_of
from dbcache.lanes.pruned_lane import PrunedLane
from dbcache.notices import say


class PrunedStack(BlockStack):
    """Blocks that are left out one by one.

    Its settings have a `DBPruneConfig`, and no predictor; see `BlockStack` for the arguments.

    Raises:
        ValueError: there is a predictor, or the blocks of several lists take turns.

    Attributes:
        start: position of the first block that may be left out.
        blocks: these blocks.
    """

    last_blocks = None
    start = 0
    is_recorded = False

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

    def make_entries(self) -> list[list[Entry]]:
        """Return what stands for each list; nothing where all blocks always run."""
        self.blocks = PrunableBlocks([], self.pattern)
        config: Any = self.settings.cache
        always = set(config.non_prune_block_ids)
        middle = range(self.fn, self.num_blocks - self.bn)
        prunable = [i not in always for i in middle]
        if True not in prunable:
            if len(middle):  # else `_clamp` has warned
                say(
                    f"{self.name}: non_prune_block_ids={config.non_prune_block_ids} leaves none of "
                    f"the {self.num_blocks} blocks to leave out: every block runs on every step"
                )
            return []
        first, prunable = trimmed(prunable)
        self.start = middle[first]
        self.blocks = PrunableBlocks(prunable, self.pattern)
        # with long skips the loop takes what a block returns on to a later one: it must be what it
        # would return
        self.blocks.fuses = not (self.spec.long_skips or self.is_recorded)
        return self.rows()

    def entry(self, position: int, block: torch.nn.Module, who: str) -> Entry:
        return self.blocks.proxy(self, position - self.start, block, who)

    @property
    def prunable(self) -> list[bool]:
        """Which blocks may be left out, from the first of them to the last."""
        return self.blocks.prunable

    def fits(self, lane: Any) -> bool:
        """Whether a lane stores these blocks."""
        return lane.blocks.prunable == self.prunable

    def new_lane(self, run: StackRun, branch: str | None, device: torch.device, step: Any) -> Any:
        run.shared.prepare(device)
        return PrunedLane(run.settings, self.prunable, device)

    def prepare_recording(self) -> None:
        """Let each block that is left out return what it would have, as it does while recorded."""
        self.is_recorded, self.blocks.fuses = True, False

    @property
    def geometry(self) -> tuple[object, ...]:
        return (*super().geometry, self.start, *self.prunable)

    def inherit(self, old: Any) -> None:
        super().inherit(old)
        self.blocks = old.blocks

    def pruned_blocks(self, lane: Any) -> Any:
        """Return a function that reads the numbers of the blocks left out on each step so far."""
        start, pruned = self.start, lane.pruned_snapshot()
        return lambda: [[start + i for i, skips in enumerate(step) if skips] for step in pruned()]


class PrunedStep(SingleBlocksStep, StackStep):
    """The step of a pruned stack in one forward; see `StackStep` for the arguments."""

    def __init__(self, stack: PrunedStack, run: StackRun, branch: str | None, forward: Any) -> None:
        SingleBlocksStep.__init__(self, stack.blocks)
        StackStep.__init__(self, stack, run, branch, forward)

    @property
    def single_blocks(self) -> PrunedStep:
        """This step: all blocks of the stack are single ones."""
        return self

    def open(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Take the step's decisions. Called with what the first block gets that may be left out."""
        check_stream(self.stack.name, hidden)
        lane = self.run.lanes.get(self.branch) or self._add_lane(hidden.device)
        code = lane.begin(layout_of(hidden, encoder), hidden.device)
        is_dynamic = code == PlanCode.DYNAMIC and lane.steps.has_reference
        if self.cutter is not None and (is_dynamic or not self.cutter.fixed_by_plan):
            self._record_all(lane, hidden, encoder)
            return
        known = lane.known()
        change = None if known is not None else self._change(lane, hidden)
        lane.decide(change, self.run.sharding)
        skipped = lane.settle(known)
        self.lane, self.cached, self.awaits_end = lane, lane.steps.cached, True
        self.start(lane.blocks, skipped, lane.state.store if lane.stores() else None)
        if self.run.groups is not None:
            self.run.groups.load(self.skips(self.stack.start))

    def _record_all(
        self, lane: PrunedLane, hidden: torch.Tensor, encoder: torch.Tensor | None
    ) -> None:
        """Let the decisions be recorded: each block is a conditional, whether it runs or not."""
        check_needs_no_vote(self.stack.name, self.run.sharding)
        if lane.blocks.state is None:
            lane.blocks.allocate(hidden, encoder)
        lane.decide(self._change(lane, hidden))
        self.lane, self.cached, self.awaits_end = lane, False, True
        self.record(lane.blocks, lane.state.store, self.cutter, lane.decisions())

    def _change(self, lane: PrunedLane, hidden: torch.Tensor) -> torch.Tensor:
        """Measure the changes of the block inputs, or take those of the step's other branch."""
        return self.run.shared(
            self.branch,
            lane.state.lane,
            lane.steps.step,
            hidden,
            lambda: lane.measure(hidden),
            is_recorded=self.cutter is not None,
        )

    def close(self) -> None:
        self.awaits_end = False
        self.lane.steps.has_reference |= self.due is not None
        if self.run.groups is not None:
            self.run.groups.free(self.skips(self.stack.start))

    def count_full(self, device: torch.device) -> None:
        """Count a step that ran without the proxies: full, with nothing kept of it."""
        if self.stack.entries:
            self.lane = lane = self.run.lanes.get(self.branch) or self._add_lane(device)
            lane.decide(None)
            lane.settle(lane.known())
            lane.forget_reference()


PrunedStack.step = PrunedStep
