"""The last blocks of a stack in one lane; some are left out on cached steps.

All that says whether they are lies on the device: the step's decision, what is stored, the rule.
The host reads which blocks are left out, on cached steps only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dbcache.config.cache import StackSettings
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.block_state import BlockState
from dbcache.kernels.pruning.decide_tail import decide_tail
from dbcache.lanes.block_store import BlockStore
from dbcache.lanes.buffers import outside_inference_mode
from dbcache.lanes.sharding import Sharding


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
        self.blocks = BlockStore(prunable, device)
        self.flags = torch.zeros(len(prunable), dtype=torch.int32, device=device)
        self.store = torch.zeros(bs.NUM_STORE, dtype=torch.int32, device=device)
        self.reload(settings)
        self.forget()

    def reload(self, settings: StackSettings) -> None:
        """Use the threshold of other settings."""
        self._threshold = settings.cache.non_compute_blocks_diff_threshold
        self.blocks.rule[bs.THRESHOLD] = self._threshold

    def force(self, code: int) -> None:
        """Leave out as many blocks as possible if the next step is fixed as cached (trials)."""
        self.blocks.rule[bs.THRESHOLD] = 1.0 if code == PlanCode.STATIC else self._threshold

    def forget(self) -> None:
        """Make everything stored void; the buffers stay allocated."""
        self.store[bs.STAMP].fill_(-1)

    def move(self, device: torch.device) -> None:
        """Move all but the stored tensors to another device."""
        self.flags, self.store = self.flags.to(device), self.store.to(device)
        self.blocks.move(device)

    def take(self, state: BlockState | None) -> None:
        """Continue with tensors of another layout, or with none; their content is void."""
        self.blocks.state = state
        self.forget()

    def tensors(self) -> list[torch.Tensor | None]:
        """Return the tensors that a step, or `force`, writes to."""
        return [self.store, *self.blocks.tensors()]

    def fit(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Drop the stored tensors if they do not fit these streams."""
        if self.blocks.state is not None and not self.blocks.state.fits(hidden, encoder):
            self.take(None)

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
        return self.blocks.read(self.flags) if cached else [False] * len(self.flags)
