"""Proxies: what the model's own loop iterates in place of its blocks while the cache is on.

There is one entry per block, in the same order and number. Probe (Fn) and last (Bn) blocks stand
for themselves; the others are proxies: plain callables that call their block on a full step and
pass their inputs through on a cached one. The decision is taken where the skipping begins, at the
first middle block; the last one returns the prediction. So whatever the model does between its
blocks keeps working, and changes to passed-through values are discarded.

Proxies are shared by all requests: the step that they act for is that of the forward under way in
their thread or task.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from dbcache.adapters.blocks.block_list import FORWARD
from dbcache.adapters.blocks.patterns import ForwardPattern, OutputForm, Streams
from dbcache.adapters.blocks.signature import Inputs


class HasBlocks(Protocol):
    """The stack that a proxy's block belongs to."""

    index: int
    """Place of the stack's step among the steps of a forward."""

    pattern: ForwardPattern
    streams: Streams


class BlockProxy:
    """Stands for one block in the model's loop. Reads of attributes go to the block."""

    __slots__ = ("block", "form", "index", "inputs", "pattern", "swaps_pair", "who")

    def __init__(self, stack: HasBlocks, block: torch.nn.Module, who: str) -> None:
        self.index = stack.index
        self.pattern = stack.pattern
        self.block = block
        self.who = who
        self.form: OutputForm | None = None
        self.swaps_pair = False
        self.inputs = Inputs(block, stack.pattern, stack.streams, who)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the part of the block in the step under way."""
        return self.run(args, kwargs)

    def step(self) -> Any:
        """Return the step that the stack takes in the forward under way; None outside of one."""
        forward = FORWARD.get()
        return None if forward is None else forward.steps[self.index]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block; the first time, learn how it packs its output."""
        output = self.block(*args, **kwargs)
        if self.form is None:
            form = OutputForm(self.pattern, output, self.who)
            self.swaps_pair = form.encoder_at == 0 and self.inputs.takes_encoder
            self.form = form
        return output

    def streams(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the streams of the block's output."""
        assert self.form is not None
        return self.form.unpack(output)

    def pack(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> Any:
        """Return the streams as the block would."""
        assert self.form is not None
        return self.form.pack(hidden, encoder)


class CheckedBlock(BlockProxy):
    """A probe or last block on the first forward: its output is checked against the pattern."""

    __slots__ = ()


class ProbeStart(BlockProxy):
    """The first block: what comes in is what the probe residual is measured from."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.step()
        if step is not None:
            step.begin(self.inputs.hidden(args, kwargs))
        return self.run(args, kwargs)


class ProbeEnd(BlockProxy):
    """The last probe block where the encoder stream is something that blocks only return."""

    __slots__ = ("is_first",)

    def __init__(
        self, stack: HasBlocks, block: torch.nn.Module, who: str, *, is_first: bool
    ) -> None:
        super().__init__(stack, block, who)
        self.is_first = is_first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.step()
        if step is not None and self.is_first:
            step.begin(self.inputs.hidden(args, kwargs))
        output = self.run(args, kwargs)
        if step is not None:
            step.encoder_fn = self.streams(output)[1]
        return output


class SkippedBlock(BlockProxy):
    """A middle block between the first and the last one: the common case, kept short."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = FORWARD.get()
        if forward is None or not forward.steps[self.index].cached:
            return self.run(args, kwargs)
        if self.swaps_pair and not args:
            return kwargs[self.inputs.encoder_name], kwargs[self.inputs.hidden_name]
        return self.pass_through(forward.steps[self.index], args, kwargs)

    def pass_through(self, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the inputs as the block would return its outputs."""
        hidden = self.inputs.hidden(args, kwargs)
        if self.form is not None and self.form.is_tensor:
            return hidden
        if self.inputs.takes_encoder:
            return self.pack(hidden, self.inputs.encoder(args, kwargs))
        return self.pack(hidden, step.encoder_fn)


class Boundary(SkippedBlock):
    """The first middle block, which decides, or the last one, which predicts or stores; or both."""

    __slots__ = ("is_first", "is_last")

    def __init__(
        self,
        stack: HasBlocks,
        block: torch.nn.Module,
        who: str,
        *,
        is_first: bool,
        is_last: bool,
    ) -> None:
        super().__init__(stack, block, who)
        self.is_first = is_first
        self.is_last = is_last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.step()
        if step is None:
            return self.run(args, kwargs)
        if self.is_first:
            step.look_at(self.block, args, kwargs)
            step.decide(self.inputs.hidden(args, kwargs), self.inputs.encoder(args, kwargs))
        if not step.cached:
            output = self.run(args, kwargs)
            if self.is_last:
                step.finish_full(*self.streams(output), self.who)
            return output
        if self.is_last:
            return self.pack(*step.finish_cached())
        return self.pass_through(step, args, kwargs)
