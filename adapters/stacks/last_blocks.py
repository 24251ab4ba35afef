"""The last blocks of a stack, of which only some run on a cached step (`Bn_compute_blocks_ids`).

The others add what they added on the last full step, unless their input changed too much since.
How much is estimated for all of them at once, before the first one: one more wait of the host, on
cached steps only.
"""

from __future__ import annotations

from typing import Any

import torch

from dbcache.adapters.stacks.proxies import BlockProxy
from dbcache.adapters.stacks.prunable_blocks import PrunableBlocks, SingleBlocksStep, trimmed
from dbcache.adapters.stacks.step import check_needs_no_vote
from dbcache.config.cache import StackSettings
from dbcache.lanes.last_blocks import LaneTail


class LastBlocks:
    """The Bn blocks of a stack, some of which may be left out.

    Args:
        stack: its config has `Bn_compute_blocks_ids`, which leave some of its Bn blocks out.

    Raises:
        ValueError: the blocks of several lists take turns.
    """

    def __init__(self, stack: Any) -> None:
        listed = stack.settings.cache.Bn_compute_blocks_ids
        if stack.round > 1:
            raise ValueError(
                f"{stack.name}: Bn_compute_blocks_ids must be empty where the blocks of several "
                f"lists take turns, got {listed}; remove it"
            )
        self.stack = stack
        first, prunable = trimmed([i not in set(listed) for i in range(stack.bn)])
        self.start = stack.num_blocks - stack.bn + first
        self.blocks = PrunableBlocks(prunable, stack.pattern)
        # they are few, and so what the loop takes from a block to a later one is as it would be
        self.blocks.fuses = False

    @classmethod
    def of(cls, stack: Any) -> LastBlocks | None:
        """Return the last blocks of `stack`, None where all of them run."""
        listed = stack.settings.cache.Bn_compute_blocks_ids
        return cls(stack) if listed and set(range(stack.bn)) - set(listed) else None

    def proxy(self, position: int, block: torch.nn.Module, who: str) -> BlockProxy:
        """Return what stands for the block at `position` of the stack."""
        return self.blocks.proxy(self.stack, position - self.start, block, who)

    def new_store(self, settings: StackSettings, device: torch.device) -> LaneTail:
        """Return what a new lane keeps of the last blocks."""
        return LaneTail(settings, self.blocks.prunable, device)

    def new_step(self, step: Any) -> LastBlocksStep:
        """Return what is under way in the last blocks; `step` is that of the whole stack."""
        return LastBlocksStep(self.blocks, step)


class LastBlocksStep(SingleBlocksStep):
    """What is under way in one forward over the last blocks."""

    def __init__(self, blocks: PrunableBlocks, step: Any) -> None:
        super().__init__(blocks)
        self.step = step

    def open(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Decide which blocks are left out on a cached step. None is on a full one."""
        step, lane = self.step, self.step.lane
        if lane is None:
            return  # the model left out the block at which the step is decided: all others run
        tail = lane.tail
        tail.fit(hidden, encoder)
        if step.cutter is not None and (step.is_conditional or step.cached):
            self._record_all(lane, hidden, encoder)
            return
        tail.decide(lane.state.counters, hidden if step.cached else None, step.run.sharding)
        due = None if step.cached else tail.store
        self.start(tail.blocks, tail.read(step.cached), due)
        if step.run.groups is not None:
            step.run.groups.load(self.skips(step.stack.last_blocks.start))

    def close(self) -> None:
        if self.step.run.groups is not None:
            self.step.run.groups.free(self.skips(self.step.stack.last_blocks.start))

    def _record_all(self, lane: Any, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Let the blocks be recorded: each is a conditional, whether it runs or not.

        On a cached step those that run are not stored: the device knows.
        """
        tail = lane.tail
        check_needs_no_vote(self.step.stack.name, self.step.run.sharding)
        if tail.blocks.state is None:
            tail.blocks.allocate(hidden, encoder)
        tail.decide(lane.state.counters, hidden)
        self.record(tail.blocks, tail.store, self.step.cutter, lane.tail_decisions())
