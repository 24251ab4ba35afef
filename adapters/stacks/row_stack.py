"""A block stack whose samples decide for themselves (`batch_reduce="each"`)."""

from __future__ import annotations

import torch

from dbcache.adapters.blocks.block_list import Entry
from dbcache.adapters.blocks.spec import StackSpec
from dbcache.adapters.stacks.base import BlockStack
from dbcache.adapters.stacks.row_step import RowBlock, RowBoundary, RowStep, not_samples
from dbcache.adapters.stacks.stack import Stack
from dbcache.config.cache import StackSettings

MIXED = ("Cosmos3OmniTransformer", "ErnieImageTransformer2DModel")
"""Transformers whose blocks are given tokens as rows, of all samples together."""


class RowStack(Stack):
    """Blocks of which the middle ones are skipped for some samples; see `BlockStack`.

    Raises:
        ValueError: the samples of a batch cannot be told apart in this model, or the stack follows
            the decisions of another one.
    """

    step = RowStep

    def __init__(
        self,
        spec: StackSpec,
        settings: StackSettings,
        index: int,
        leader: BlockStack | None = None,
    ) -> None:
        super().__init__(spec, settings, index, leader)
        reason = None
        if leader is not None:
            reason = "decision_scope='model' decides for the batch in the first stack"
        elif spec.interleaved or type(spec.lists[0].owner).__name__ in MIXED:
            reason = "the rows of its blocks are not the samples of the batch"
        elif self.makes_encoder:
            reason = "its blocks make the encoder states themselves"
        if reason is not None:
            raise not_samples(self, reason)

    def entry(self, position: int, block: torch.nn.Module, who: str) -> Entry:
        first, last = self.fn, self.num_blocks - self.bn - 1
        if position in (first, last):
            return RowBoundary(
                self, block, who, is_first=position == first, is_last=position == last
            )
        if first < position < last:
            return RowBlock(self, block, who)
        return super().entry(position, block, who)

    @property
    def geometry(self) -> tuple[object, ...]:
        return (*super().geometry, "each")

    def check_recordable(self, settings: StackSettings) -> None:
        raise ValueError(
            f"{self.name}: a recorded step decides for the batch as a whole, got "
            f"batch_reduce='each'; leave out cuda_graph, or choose 'mean' or 'max'"
        )
