"""A run of blocks of which single ones may be left out, and the guards that stand for them.

A guard whose block runs stores what it was given and what it added. Of neighbours that are left
out, all but the last pass their inputs through, and the last one adds what all of them added when
they were stored. Where the model's loop works on what a block returns before the next one gets it
(a ControlNet's residuals, an adapter of faces), a block returns what it would have: a run ends.

While a step is recorded, each block that may be left out becomes a branch: it runs and is stored,
or what it would have returned is written into the very tensors that it returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dbcache.adapters.blocks.patterns import ForwardPattern
from dbcache.adapters.stacks.proxies import CheckGuard, Guard
from dbcache.graphs.recording import Cutter
from dbcache.lanes.block_store import BlockStore
from dbcache.lanes.decision import Decision

if TYPE_CHECKING:
    from dbcache.adapters.stacks.stack import Stack

Streams = tuple[torch.Tensor, torch.Tensor | None]


def trimmed(prunable: list[bool]) -> tuple[int, list[bool]]:
    """Return where the first block is that may be left out, and `prunable` from it to the last."""
    first, behind = prunable.index(True), len(prunable) - prunable[::-1].index(True)
    return first, prunable[first:behind]


class BlockRun:
    """The run under way, from the first block that may be left out to the last one.

    Args:
        name: of the stack, for errors.
        prunable: which of the blocks may be left out.
        pattern: what the blocks take and return.
        open_step: called with the streams that the first block gets; it calls `start`, or all run.
        close_step: called when the last block is done.

    Attributes:
        fuses: of neighbours that are left out only the last one returns what it would have.
        breaks: blocks whose output is not what the next one gets; no run goes on behind them.
        due: what blocks that run are stored by; None: they are not.
        cutter: records the step, whose blocks follow `decisions`; None: it is not recorded.
        last: what the block before returned.
    """

    def __init__(
        self,
        name: str,
        prunable: Sequence[bool],
        pattern: ForwardPattern,
        open_step: Callable[[torch.Tensor, torch.Tensor | None], None],
        close_step: Callable[[], None],
    ) -> None:
        self.name = name
        self.prunable = list(prunable)
        self.returns_encoder = len(pattern.returns) == 2
        self.open_step = open_step
        self.close_step = close_step
        self.fuses = True
        self.breaks: set[int] = set()
        self.forget_step()

    def forget_step(self) -> None:
        """Drop what belongs to the step under way."""
        self.cache: BlockStore | None = None
        self.skipped: list[bool] = []
        self.due: torch.Tensor | None = None
        self.cutter: Cutter | None = None
        self.decisions: Sequence[Decision] = ()
        self._first: int | None = None
        self.encoder: torch.Tensor | None = None
        self.last: torch.Tensor | None = None

    def guard(self, stack: Stack, index: int, block: torch.nn.Module, who: str) -> Guard:
        """Return what stands for block `index` of the run; it may lie before or behind."""
        if 0 <= index < len(self.prunable):
            return PruneGuard(stack, block, who, self, index)
        if index == -1 and stack.makes_encoder:
            return EncoderGuard(stack, block, who, self)
        return CheckGuard(stack, block, who)

    def start(self, cache: BlockStore, skipped: list[bool], due: torch.Tensor | None) -> None:
        """Begin the step: which blocks are left out, and how those that run are stored."""
        self.cache, self.skipped, self.due = cache, skipped, due

    def record(
        self,
        cache: BlockStore,
        due: torch.Tensor,
        cutter: Cutter | None,
        decisions: Sequence[Decision],
    ) -> None:
        """Begin the step and let `cutter` record it: its blocks go by `decisions`."""
        self.start(cache, [], due)
        self.cutter, self.decisions = cutter, decisions

    def ends_run(self, index: int) -> bool:
        """Whether block `index`, left out, is the last of its neighbours; note the first one."""
        if self._first is None:
            self._first = index
        is_last = index + 1 == len(self.skipped) or not self.skipped[index + 1]
        return is_last or not self.fuses or index in self.breaks

    def replace(self, index: int, hidden: torch.Tensor, encoder: torch.Tensor | None) -> Streams:
        """Return what the blocks left out up to `index` would have made of the streams."""
        assert self.cache is not None
        assert self._first is not None
        first, self._first = self._first, None
        return self.cache.replace(first, index + 1 - first, hidden, encoder)

    def store(self, index: int, before: Streams, after: Streams, who: str) -> None:
        """Store what a block that ran was given and added."""
        assert self.cache is not None
        assert self.due is not None
        for stream, given, returned in zip(("hidden", "encoder"), before, after, strict=True):
            if given is not None and returned is not None and given.shape != returned.shape:
                raise ValueError(
                    f"{who}: the blocks that may be left out must keep the shape of "
                    f"{stream}_states, got {tuple(given.shape)} before and "
                    f"{tuple(returned.shape)} after; name it in non_prune_block_ids, or set Fn "
                    f"and Bn so that it is outside"
                )
        hidden, encoder = before
        self.cache.store(index, self.due, hidden, after[0], encoder, after[1])

    def finish(self, index: int) -> None:
        """Note that block `index` is done."""
        if index + 1 == len(self.prunable):
            self.close_step()


class EncoderGuard(Guard):
    """The block before the run, where the encoder stream is something that blocks only return."""

    __slots__ = ("run_of_blocks",)

    def __init__(self, stack: Stack, block: torch.nn.Module, who: str, run: BlockRun) -> None:
        super().__init__(stack, block, who)
        self.run_of_blocks = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.run(args, kwargs)
        self.run_of_blocks.encoder = self.streams(output)[1]
        return output


class PruneGuard(Guard):
    """A block of the run: it runs and is stored, or is left out."""

    __slots__ = ("index", "overwrites", "run_of_blocks")

    def __init__(
        self, stack: Stack, block: torch.nn.Module, who: str, run: BlockRun, index: int
    ) -> None:
        super().__init__(stack, block, who)
        self.run_of_blocks = run
        self.index = index
        self.overwrites: bool | None = None  # whether the block writes into its inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, index = self.run_of_blocks, self.index
        hidden = self.inputs.hidden(args, kwargs)
        encoder = self.inputs.encoder(args, kwargs) if self.inputs.takes_encoder else run.encoder
        if not run.returns_encoder:
            encoder = None
        if index == 0:
            run.open_step(hidden, encoder)
        if run.cache is None:
            return self.run(args, kwargs)  # the model left out the block that decides
        if index > 0 and hidden is not run.last:
            run.breaks.add(index - 1)
        if run.cutter is not None:
            output = self._run_or_not(run.cutter, args, kwargs, hidden, encoder)
        elif not run.skipped[index]:
            output = self._run_and_store(args, kwargs, hidden, encoder)
        else:
            streams = hidden, encoder
            if run.ends_run(index):
                streams = run.replace(index, *streams)
            run.last, run.encoder = streams
            output = self.pack(*streams)
        run.finish(index)
        return output

    def _run_or_not(
        self,
        cutter: Cutter,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hidden: torch.Tensor,
        encoder: torch.Tensor | None,
    ) -> Any:
        """Record both ways of a block that may be left out."""
        run, index = self.run_of_blocks, self.index
        if not run.prunable[index]:
            return self._run_and_store(args, kwargs, hidden, encoder)
        assert run.cache is not None
        cutter.begin_full(run.decisions[index], self.who)
        output = self._run_and_store(args, kwargs, hidden, encoder)
        cutter.begin_cached()
        left_out = run.cache.replace(index, 1, hidden, encoder)
        for returned, kept in zip((run.last, run.encoder), left_out, strict=True):
            if returned is not None and kept is not None and returned is not kept:
                returned.copy_(kept)
        cutter.end_branch()
        return output

    def _run_and_store(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hidden: torch.Tensor,
        encoder: torch.Tensor | None,
    ) -> Any:
        run = self.run_of_blocks
        stores = run.due is not None
        before = hidden, encoder
        if stores and self.overwrites is not False:
            before = hidden.clone(), None if encoder is None else encoder.clone()
        output = self.run(args, kwargs)
        after = self.streams(output)
        if stores:
            if self.overwrites is None and run.cutter is None:
                self.overwrites = not all(
                    torch.equal(given, kept)
                    for given, kept in zip((hidden, encoder), before, strict=True)
                    if given is not None and kept is not None
                )
            run.store(self.index, before, after, self.who)
        run.last, run.encoder = after
        return output
