"""A block stack whose samples decide for themselves (`batch_reduce="each"`)."""

from __future__ import annotations

from dbcache.adapters.stacks.row_step import RowBlock, RowStep, not_samples
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
    middle = RowBlock

    def check(self) -> None:
        super().check()
        spec, reason = self.spec, None
        if self.leader is not None:
            reason = "decision_scope='model' decides for the batch in the first stack"
        elif spec.interleaved or type(spec.lists[0].owner).__name__ in MIXED:
            reason = "the rows of its blocks are not the samples of the batch"
        elif self.makes_encoder:
            reason = "its blocks make the encoder states themselves"
        if reason is not None:
            raise not_samples(self, reason)

    def check_recordable(self, settings: StackSettings) -> None:
        raise ValueError(
            f"{self.name}: a recorded step decides for the batch as a whole, got "
            f"batch_reduce='each'; leave out cuda_graph, or choose 'mean' or 'max'"
        )
