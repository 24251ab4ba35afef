"""The last blocks of a stack, of which only some run on a cached step (`Bn_compute_blocks_ids`).

The others add what they added on the last full step, unless their input changed too much since.
How much is estimated for all of them at once, before the first one: one more wait of the host, on
cached steps only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dbcache.adapters.block_run import BlockRun, EncoderGuard, PruneGuard
from dbcache.adapters.guards import CheckGuard, Guard
from dbcache.kernels import block_state as bs
from dbcache.pruned_lane import BlockCache

if TYPE_CHECKING:
    from dbcache.adapters.stack import Stack


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
        first = stack.num_blocks - stack.bn
        prunable = [i not in listed for i in range(stack.bn)]
        skip, keep = prunable.index(True), stack.bn - prunable[::-1].index(True)
        self.start, self.first = first + skip, first
        self.run = BlockRun(stack.name, prunable[skip:keep], stack.pattern, self._open, self._close)
        # it is short, and so what the loop takes from a block to a later one is what it would be
        self.run.fuses = False
        self.caches: dict[str | None, BlockCache] = {}

    @classmethod
    def of(cls, stack: Stack) -> Tail | None:
        """Return the tail of `stack`, None where all of its last blocks run."""
        listed = stack.settings.cache.Bn_compute_blocks_ids
        return cls(stack) if listed and set(range(stack.bn)) - set(listed) else None

    def guard(self, position: int, block: torch.nn.Module, who: str) -> Guard:
        """Return what stands for the block at `position` of the stack."""
        index = position - self.start
        if 0 <= index < len(self.run.prunable):
            return PruneGuard(self.stack, block, who, self.run, index)
        if index == -1 and self.stack.makes_encoder:
            return EncoderGuard(self.stack, block, who, self.run)
        return CheckGuard(self.stack, block, who)

    def start_request(self) -> None:
        """Forget the last request; the buffers stay allocated."""
        for cache in self.caches.values():
            cache.is_complete = False

    def _open(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Decide which blocks are left out on a cached step. None is on a full one."""
        stack = self.stack
        cache = self.caches.get(stack.branch)
        if cache is None:
            rule = [0.0] * bs.NUM_RULE
            rule[bs.THRESHOLD] = stack.settings.cache.non_compute_blocks_diff_threshold
            cache = self.caches[stack.branch] = BlockCache(self.run.prunable, rule)
        layout: tuple[object, ...] = (hidden.shape, hidden.dtype, hidden.device)
        cache.fit(layout if encoder is None else (*layout, encoder.shape, encoder.dtype))
        skipped = [False] * len(self.run.prunable)
        if stack.cached and cache.is_complete:
            skipped, _ = cache.decide(cache.measure(hidden), stack.sharding)
        step = stack.lane.step if stack.lane is not None else 0
        due = None if stack.cached else cache.due(step, hidden.device)
        self.run.start(cache, skipped, due)

    def _close(self) -> None:
        """Nothing is left to do: the step was finished by the middle blocks."""

    def nbytes(self, branch: str | None) -> int:
        """Bytes of what is stored of the blocks under a guidance branch."""
        return self.caches[branch].nbytes() if branch in self.caches else 0
