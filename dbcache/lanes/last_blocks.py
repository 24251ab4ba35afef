"""The last blocks of a stack in one lane; some are left out on cached steps.

All that says whether they are lies on the device: the step's decision, what is stored, the rule.
The host reads which blocks are left out, on cached steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from dbcache.config.cache import StackSettings
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.decide_tail import decide_tail
from dbcache.lanes.block_store import BlockStore
from dbcache.lanes.buffers import outside_inference_mode
from dbcache.lanes.decision import Decision
from dbcache.lanes.sharding import Sharding

PREFIX = "tail."
"""Of the names of the tail's buffers among those of the lane."""


class LaneTail:
    """The stored last blocks of a lane, from the first to the last that can be left out.

    Args:
        settings: of the stack.
        prunable: which of the blocks may be left out.
        device: of the blocks.

    Attributes:
        flags: int32 (M,) on the device: 1 for a block that is left out on the latest step.
        store: int32 (NUM_STORE,), what `store_block` does on it, see `decide_tail`.
    """

    @outside_inference_mode
    def __init__(
        self, settings: StackSettings, prunable: Sequence[bool], device: torch.device
    ) -> None:
        self.blocks = BlockStore(prunable, [0.0] * bs.NUM_RULE, device)
        self.flags = torch.zeros(len(prunable), dtype=torch.int32, device=device)
        self.store = torch.zeros(bs.NUM_STORE, dtype=torch.int32, device=device)
        self.skipped = [False] * len(prunable)
        self.reload(settings)
        self.forget()

    def reload(self, settings: StackSettings) -> None:
        """Use the threshold of other settings."""
        self._threshold = settings.cache.non_compute_blocks_diff_threshold
        self._write_threshold(self._threshold)

    def force(self, code: int) -> None:
        """Leave out as many blocks as possible if the next step is fixed as cached (trials)."""
        self._write_threshold(1.0 if code == PlanCode.STATIC else self._threshold)

    def _write_threshold(self, threshold: float) -> None:
        rule = [0.0] * bs.NUM_RULE
        rule[bs.THRESHOLD] = threshold
        self.blocks.write_rule(rule)

    def forget(self) -> None:
        """Make everything stored void; the buffers stay allocated."""
        self.store[bs.STAMP].fill_(-1)

    def move(self, device: torch.device) -> None:
        """Move all but the stored tensors to another device."""
        self.flags, self.store = self.flags.to(device), self.store.to(device)
        self.blocks.move(device)

    def buffers_by_name(self) -> dict[str, torch.Tensor | None]:
        """Return the stored tensors, by names of the lane."""
        return {PREFIX + name: x for name, x in self.blocks.buffers_by_name().items()}

    def take_buffers(self, buffers: dict[str, Any]) -> None:
        """Continue with the tail's part of the lane's `buffers`; their content is void."""
        own = {k.removeprefix(PREFIX): x for k, x in buffers.items() if k.startswith(PREFIX)}
        self.blocks.take_buffers(own)
        self.forget()

    def tensors(self) -> list[torch.Tensor]:
        """Return the small tensors that a step, or `force`, writes to."""
        return [self.store, self.blocks.rule]

    def fit(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Drop the stored tensors if they do not fit these streams."""
        if self.blocks.state is not None and not self.blocks.state.fits(hidden, encoder):
            self.take_buffers({})

    def decide(
        self,
        counters: torch.Tensor,
        hidden: torch.Tensor | None,
        sharding: Sharding | None = None,
    ) -> None:
        """Decide on the device which blocks the latest step leaves out, and what it stores.

        Args:
            counters: of the lane's state, after the step was decided.
            hidden: what the first of the blocks is called with; None on a step known to be full.
            sharding: as in `BlockStore.choose`.
        """
        decisions = None
        if hidden is not None and self.blocks.state is not None:
            decisions = self.blocks.choose(self.blocks.measure(hidden), sharding)
        decide_tail(counters, decisions, self.flags, self.store)

    def read(self, cached: bool) -> list[bool]:
        """Return which blocks are left out; waits for the device where the step is `cached`."""
        nothing = [False] * len(self.skipped)
        self.skipped = self.blocks.read(self.flags) if cached else nothing
        return self.skipped

    def decisions(self, is_cached: Callable[[], bool]) -> list[Decision]:
        """Return the decisions on the blocks, for recorded work.

        The lane has counted the step, and what is stored is known to the device.

        Args:
            is_cached: says whether the lane's latest step is; asked once, by the first block.
        """

        def read(index: int) -> bool:
            if index == 0:
                self.read(is_cached())
            return self.skipped[index]

        return [
            Decision(self.flags[i : i + 1], partial(read, i), lambda: None)
            for i in range(len(self.skipped))
        ]
