"""The last blocks of a stack, of which only some run on a cached step (`Bn_compute_blocks_ids`).

The others add what they added on the last full step, unless their input changed too much since.
How much is estimated for all of them at once, before the first one: one more wait of the host, on
cached steps only.
"""

from __future__ import annotations

from typing import Any

import torch

from dbcache.adapters.stacks.prunable_blocks import PrunableBlocks, SingleBlocksStep


def last_blocks_of(stack: Any) -> PrunableBlocks | None:
    """Return the Bn blocks of `stack` from the first that may be left out; None: all of them run.

    Raises:
        ValueError: the blocks of several lists take turns.
    """
    listed = stack.settings.cache.Bn_compute_blocks_ids
    first = stack.last_middle + 1
    positions = [first + i for i in range(stack.bn) if i not in listed]
    if not listed or not positions:
        return None
    if stack.round > 1:
        raise ValueError(
            f"{stack.name}: Bn_compute_blocks_ids must be empty where the blocks of several "
            f"lists take turns, got {listed}; remove it"
        )
    return PrunableBlocks(positions, stack.pattern)


class LastBlocksStep(SingleBlocksStep):
    """What is under way in one forward over the last blocks of `stack`, in a request's `run`."""

    def __init__(self, stack: Any, run: Any) -> None:
        self.stack, self.run = stack, run

    def open(self, step: Any, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Decide which blocks are left out on a cached step. None is on a full one."""
        lane, run = step.lane, self.run
        if lane is None:
            return  # the model left out the block at which the step is decided: all others run
        tail, counters = lane.tail, lane.state.counters
        tail.fit(hidden, encoder)
        if step.cutter is not None and (step.is_conditional or step.cached):
            run.check_needs_no_vote()
            if tail.blocks.state is None:
                tail.blocks.allocate(hidden, encoder)
            tail.decide(counters, hidden)
            # on a cached step those that run are not stored: the device knows
            self.start(tail.blocks, [], tail.store, step.cutter, lane.tail_decisions())
        else:
            tail.decide(counters, hidden if step.cached else None, run.sharding)
            self.start(tail.blocks, tail.read(step.cached), None if step.cached else tail.store)
