"""The last blocks of a stack, of which only some run on a cached step (`Bn_compute_blocks_ids`).

The others add what they added on the last full step, unless their input changed too much since.
How much is estimated for all of them at once, before the first one: one more wait of the host, on
cached steps only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dbcache.adapters.stacks.prunable_blocks import BlockRun, trimmed
from dbcache.lanes.lane import Lane
from dbcache.lanes.last_blocks import LaneTail

if TYPE_CHECKING:
    from dbcache.adapters.stacks.stack import Stack


class Tail:
    """The Bn blocks of a stack, some of which may be left out.

    Args:
        stack: its config has `Bn_compute_blocks_ids`, which leave some of its Bn blocks out.

    Raises:
        ValueError: the blocks of several lists take turns.
    """

    def __init__(self, stack: Stack) -> None:
        if stack.round > 1:
            raise ValueError(
                f"{stack.name}: Bn_compute_blocks_ids must be empty where the blocks of several "
                f"lists take turns, got {stack.settings.cache.Bn_compute_blocks_ids}; remove it"
            )
        self.stack = stack
        listed = set(stack.settings.cache.Bn_compute_blocks_ids)
        first, prunable = trimmed([i not in listed for i in range(stack.bn)])
        self.start = stack.num_blocks - stack.bn + first
        self.run = BlockRun(stack.name, prunable, stack.pattern, self._open, self._close)
        # it is short, and so what the loop takes from a block to a later one is what it would be
        self.run.fuses = False

    @classmethod
    def of(cls, stack: Stack) -> Tail | None:
        """Return the tail of `stack`, None where all of its last blocks run."""
        listed = stack.settings.cache.Bn_compute_blocks_ids
        return cls(stack) if listed and set(range(stack.bn)) - set(listed) else None

    def _open(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Decide which blocks are left out on a cached step. None is on a full one."""
        stack, lane = self.stack, self.stack.lane
        if lane is None:
            return  # the model left out the block at which the step is decided: all others run
        tail = lane.tail
        assert tail is not None
        tail.fit(hidden, encoder)
        if stack.cutter is not None and (stack.is_branch or stack.cached):
            self._record(lane, tail, hidden, encoder)
            return
        tail.decide(lane.state.counters, hidden if stack.cached else None, stack.sharding)
        due = None if stack.cached else tail.store
        self.run.start(tail.blocks, tail.read(stack.cached), due)

    def _record(
        self, lane: Lane, tail: LaneTail, hidden: torch.Tensor, encoder: torch.Tensor | None
    ) -> None:
        """Let the blocks be recorded: each is a branch, whether it runs or not.

        On a cached step those that run are not stored: the device knows.
        """
        self.stack.check_needs_no_vote()
        if tail.blocks.state is None:
            tail.blocks.allocate(hidden, encoder)
        tail.decide(lane.state.counters, hidden)
        self.run.record(tail.blocks, tail.store, self.stack.cutter, lane.tail_decisions())

    def _close(self) -> None:
        """Nothing is left to do: the step was finished by the middle blocks."""


def new_lane_tail(stack: Stack, device: torch.device) -> LaneTail | None:
    """Return what a new lane of `stack` keeps of its last blocks; None where all of them run."""
    if stack.tail is None:
        return None
    return LaneTail(stack.settings, stack.tail.run.prunable, device)
