"""Neighbouring blocks of which single ones may be left out, and the proxies that stand for them.

A proxy whose block runs stores what it was given and what it added. Of neighbours that are left
out, all but the last pass their inputs through, and the last one adds what all of them added when
they were stored. Where the model's loop works on what a block returns before the next one gets it
(a ControlNet's residuals, an adapter of faces), a block returns what it would have: a run ends.

While a step is recorded, each block that may be left out becomes a conditional: it runs and is
stored, or what it would have returned is written into the very tensors that it returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dbcache.adapters.blocks.patterns import ForwardPattern
from dbcache.adapters.stacks.gradients import Streams, followed
from dbcache.adapters.stacks.input_copies import InputCopies
from dbcache.adapters.stacks.proxies import BlockProxy
from dbcache.lanes.buffers import written
from dbcache.lanes.decision import Decision

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class PrunableBlocks:
    """From the first block that may be left out to the last one: what all requests share.

    Args:
        positions: of the blocks that may be left out, in the stack.
        pattern: what the blocks take and return.

    Attributes:
        start: position of the first one.
        prunable: which of those from the first to the last may be left out.
        breaks: blocks whose output is not what the next one gets; no run goes on behind them.
    """

    def __init__(self, positions: Sequence[int], pattern: ForwardPattern) -> None:
        self.start = positions[0]
        self.prunable = [i in positions for i in range(self.start, positions[-1] + 1)]
        self.returns_encoder = len(pattern.returns) == 2
        self.breaks: set[int] = set()

    def kind_of(self, position: int, stack: Any) -> type[BlockProxy]:
        """Return what stands for the block at a position of the stack, before or behind as well."""
        if self.start <= position < self.start + len(self.prunable):
            return PrunableBlock
        is_maker = position == self.start - 1 and stack.makes_encoder
        return EncoderMaker if is_maker else BlockProxy


class SingleBlocksStep:
    """What is under way in one forward over blocks that may be left out one by one.

    Attributes:
        stack: which has the blocks.
        blocks: these; known from the first one on.
        run: what the request keeps of the stack.
        store: what is stored of the blocks; None until the step is decided.
        skipped: which blocks are left out.
        due: what blocks that run are stored by; None: they are not.
        recording: the `Cutter` that records the step, whose blocks follow `decisions`; or None.
        encoder: encoder states that the block before returned.
        last: hidden states that the block before returned.
        hides_gradients: as in `Step`.
    """

    stack: Any
    blocks: PrunableBlocks
    run: Any
    hides_gradients = False
    store: Any = None
    skipped: list[bool]
    due: torch.Tensor | None
    recording: Any
    decisions: Sequence[Decision]
    encoder: torch.Tensor | None = None
    last: Any = None
    _first: int | None = None

    def open(self, step: Any, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Decide which blocks are left out, given what the first one gets; or let all run.

        `step` is that of the whole stack. To hold it would close a circle, and keep activations.
        """
        raise NotImplementedError

    def start(
        self,
        store: Any,
        skipped: list[bool],
        due: torch.Tensor | None,
        recording: Any = None,
        decisions: Sequence[Decision] = (),
    ) -> None:
        """Begin the step, as it was decided; see the attributes."""
        self.store, self.skipped, self.due = store, skipped, due
        self.recording, self.decisions = recording, decisions
        if self.run.groups is not None:
            self.run.groups.load(self.skips)

    def close(self) -> None:
        """The last block is done."""
        if self.run.groups is not None:
            self.run.groups.free(self.skips)

    def skips(self, position: int) -> bool:
        """Whether the block at a position of the stack is left out."""
        index = position - self.blocks.start
        return 0 <= index < len(self.skipped) and self.skipped[index]

    def ends_run(self, index: int) -> bool:
        """Whether block `index`, left out, is the last of its neighbours; note the first one."""
        if self._first is None:
            self._first = index
        is_last = index + 1 == len(self.skipped) or not self.skipped[index + 1]
        return is_last or not self.stack.fuses or index in self.blocks.breaks

    def replace(self, index: int, hidden: torch.Tensor, encoder: torch.Tensor | None) -> Streams:
        """Return what the blocks left out up to `index` would have made of the streams."""
        assert self._first is not None
        first, self._first = self._first, None
        made = self.store.replace(first, index + 1 - first, (hidden, encoder))
        return followed(self, (hidden, encoder), made) if hidden.requires_grad else made

    def keep(self, index: int, before: Streams, after: Streams, who: str) -> None:
        """Store what a block that ran was given and added."""
        for stream, given, returned in zip(("hidden", "encoder"), before, after, strict=True):
            if given is not None and returned is not None and given.shape != returned.shape:
                raise ValueError(
                    f"{who}: the blocks that may be left out must keep the shape of "
                    f"{stream}_states, got {tuple(given.shape)} before and "
                    f"{tuple(returned.shape)} after; name it in non_prune_block_ids, or set Fn "
                    f"and Bn so that it is outside"
                )
        self.store.store(index, self.due, before, after)


class EncoderMaker(BlockProxy):
    """The block before the first prunable one, where blocks only return the encoder states."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.run(args, kwargs)
        step = self.step()
        if step is not None:
            step.single_blocks.encoder = self.form.unpack(output)[1]
        return output


class PrunableBlock(BlockProxy):
    """One of the prunable blocks: it runs and is stored, or is left out."""

    __slots__ = ("blocks", "copies", "number")

    def __init__(self, stack: Any, block: torch.nn.Module, who: str, place: int) -> None:
        super().__init__(stack, block, who, place)
        self.blocks, self.copies = stack.single_blocks, InputCopies()
        self.number = place - self.blocks.start

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        whole = self.step()
        if whole is None:
            return self.run(args, kwargs)
        step, index = whole.single_blocks, self.number
        hidden, encoder = self.hidden_in(args, kwargs), None
        if self.blocks.returns_encoder:
            encoder = step.encoder if self.encoder_in is None else self.encoder_in(args, kwargs)
        streams, call = (hidden, encoder), (args, kwargs)
        if index == 0:
            step.blocks = self.blocks
            step.open(whole, hidden, encoder)
        if step.store is None:
            return self.run(args, kwargs)  # the model left out the block that decides
        if index > 0 and hidden is not step.last:
            self.blocks.breaks.add(index - 1)
        if step.recording is not None:
            output = self._record(step, call, streams)
        elif not step.skipped[index]:
            output = self._run_and_keep(step, call, streams)
        else:
            if step.ends_run(index):
                streams = step.replace(index, *streams)
            step.last, step.encoder = streams
            output = self.form.pack(*streams)
        if index + 1 == len(self.blocks.prunable):
            step.close()
        return output

    def _record(self, step: SingleBlocksStep, call: Arguments, given: Streams) -> Any:
        """Record both ways of a block that may be left out."""
        index, cutter = self.number, step.recording
        if not self.blocks.prunable[index]:
            return self._run_and_keep(step, call, given)
        cutter.begin_full(step.decisions[index], self.who)
        output = self._run_and_keep(step, call, given)
        cutter.begin_cached()
        written(step.store.replace(index, 1, given), (step.last, step.encoder))
        cutter.end_branch()
        return output

    def _run_and_keep(self, step: SingleBlocksStep, call: Arguments, given: Streams) -> Any:
        before = given if step.due is None else self.copies.of(given)
        output = self.run(*call)
        after = self.form.unpack(output)
        if step.due is not None:
            if step.recording is None:
                self.copies.learn(given, before)
            step.keep(self.number, before, after, self.who)
        step.last, step.encoder = after
        return output
