"""A block stack under DBPrune: its guards, its lanes, and the step that is under way."""

from __future__ import annotations

import warnings

import torch

from dbcache.adapters.blocks.block_adapter import StackSpec
from dbcache.adapters.blocks.block_list import Entry
from dbcache.adapters.stacks.prunable_blocks import BlockRun, trimmed
from dbcache.adapters.stacks.stack import Stack
from dbcache.config.cache import StackSettings
from dbcache.config.prune import DBPruneConfig
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.kernels.pruning.decide_step import decide_step
from dbcache.lanes.lane import layout_of
from dbcache.lanes.pruned_lane import BlockDecision, PrunedLane


class PrunedStack(Stack):
    """Blocks that are left out one by one.

    Args:
        spec: lists that run one after the other.
        settings: with a `DBPruneConfig`, and without a predictor.

    Raises:
        ValueError: there is a predictor, or the blocks of several lists take turns.
    """

    lanes: dict[str | None, PrunedLane]  # type: ignore[assignment]
    lane: PrunedLane | None  # type: ignore[assignment]

    def __init__(self, spec: StackSpec, settings: StackSettings) -> None:
        if settings.slots > 1 or settings.replace:
            raise ValueError(
                f"DBPruneConfig: a block that is left out must add what it last added, got the "
                f"predictor {settings.predictor.strify()}; leave the calibrator out, or use a "
                f"DBCacheConfig"
            )
        if spec.interleaved:
            names = ", ".join(block_list.path for block_list in spec.lists)
            raise ValueError(
                f"DBPruneConfig: blocks must run list by list, got {names}, which take turns and "
                f"rearrange the tokens in between; use a DBCacheConfig"
            )
        assert spec.pattern is not None
        # with long skips the loop takes what a block returns on to a later one: it must be what it
        # would return
        self.fuses = not spec.long_skips
        super().__init__(list(spec.lists), spec.pattern, settings, spec.streams)

    def _make_entries(self) -> list[list[Entry]]:
        """Return what stands for each list; nothing where all blocks always run."""
        config = self.settings.cache
        assert isinstance(config, DBPruneConfig)
        always = set(config.non_prune_block_ids)
        middle = range(self.fn, self.num_blocks - self.bn)
        prunable = [i not in always for i in middle]
        if True not in prunable:
            if len(middle):  # else `_clamp` has warned
                warnings.warn(
                    f"{self.name}: non_prune_block_ids={config.non_prune_block_ids} leaves none of "
                    f"the {self.num_blocks} blocks to leave out: every block runs on every step",
                    stacklevel=2,
                )
            return []
        first, prunable = trimmed(prunable)
        self.start = middle[first]
        if any(lane.cache.prunable != prunable for lane in self.lanes.values()):
            self.lanes.clear()  # blocks were added or taken away
        self.run = BlockRun(self.name, prunable, self.pattern, self._open, self._close)
        self.run.fuses = self.fuses
        return self._rows()

    def _entry(self, position: int, block: torch.nn.Module, who: str) -> Entry:
        """Return what stands for the block at `position` of the stack."""
        return self.run.guard(self, position - self.start, block, who)

    def forget_step(self) -> None:
        super().forget_step()
        if self.entries:
            self.run.forget_step()

    def _open(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Take the step's decisions. Called with what the first block gets that may be left out."""
        self._check_stream(hidden)
        lane = self.lanes.get(self.branch) or self._add_lane(hidden.device)
        code = lane.start_step(layout_of(hidden, encoder), hidden.device)
        is_open = code == PlanCode.DYNAMIC and lane.has_reference
        if self.cutter is not None and (is_open or not self.cutter.fixed_by_plan):
            self._record(lane, hidden, encoder)
            return
        known, decisions = lane.known(), None
        if known is None:
            decisions = lane.cache.choose(self._changes(lane, hidden), self.sharding)
        decide_step(lane.state, decisions)
        skipped = lane.settle(known)
        self.lane, self.cached, self.is_open = lane, lane.cached, True
        self.run.start(lane.cache, skipped, lane.state.store if lane.stores() else None)

    def _record(self, lane: PrunedLane, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Let the step's decisions be recorded: each block is a branch, whether it runs or not."""
        self.check_needs_no_vote()
        if lane.cache.state is None:
            lane.cache.allocate(hidden, encoder)
        decide_step(lane.state, lane.cache.choose(self._changes(lane, hidden)))
        self.lane, self.cached, self.is_open = lane, False, True
        decisions = [BlockDecision(lane, i, i == 0) for i in range(len(self.run.prunable))]
        self.run.record(lane.cache, lane.state.store, self.cutter, decisions)

    def _add_lane(self, device: torch.device) -> PrunedLane:
        self.shared.prepare(device)
        lane = PrunedLane(self.settings, self.run.prunable, device)
        self.lanes[self.branch] = lane
        return lane

    def count_full_step(self, branch: str | None, device: torch.device) -> None:
        """Count a step that ran without the guards: full, with nothing kept of it."""
        self.branch = branch
        if self.entries:
            self.lane = lane = self._add_lane(device)
            decide_step(lane.state, None)
            lane.settle(lane.known())
            lane.forget_reference()

    def _changes(self, lane: PrunedLane, hidden: torch.Tensor) -> torch.Tensor:
        """Measure the changes of the block inputs, or take those of the step's other branch."""
        return self.shared(
            self.branch,
            lane.state.lane,
            lane.step,
            hidden,
            lambda: lane.cache.measure(hidden),
            is_recorded=self.cutter is not None,
        )

    def prepare_recording(self) -> None:
        """Let each block that is left out return what it would have, as it does while recorded."""
        super().prepare_recording()
        self.fuses = False
        if self.entries:
            self.run.fuses = False

    @property
    def recorded(self) -> tuple[object, ...]:
        """What recorded work depends on."""
        which = (self.start, *self.run.prunable) if self.entries else ()
        return (*super().recorded, *which)

    def pruned_blocks(self, branch: str | None) -> list[list[int]] | None:
        """Return the numbers of the blocks that were left out on each step."""
        steps = self.lanes[branch].pruned()
        return [[self.start + i for i, skips in enumerate(step) if skips] for step in steps]

    def _close(self) -> None:
        self.is_open = False
        assert self.lane is not None
        self.lane.has_reference |= self.run.due is not None
