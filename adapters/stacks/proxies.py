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

from typing import Any

import torch

from dbcache.adapters.blocks.patterns import ENCODER, HIDDEN, ForwardPattern, Streams, describe
from dbcache.adapters.blocks.signature import parameter_names
from dbcache.adapters.blocks.views import FORWARD


class Stream:
    """Finds one stream among the arguments of a block; the signature is read once."""

    __slots__ = ("at", "name", "who")

    def __init__(self, block: torch.nn.Module, streams: Streams, position: int, who: str) -> None:
        self.name, self.who = streams[position], who
        names = parameter_names(block)
        self.at = names.index(self.name) if self.name in names else position

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the stream that the block is called with."""
        if self.name in kwargs:
            return kwargs[self.name]
        if self.at < len(args):
            return args[self.at]
        given = [*map(describe, args), *sorted(kwargs)]
        raise ValueError(f"{self.who}: must be called with {self.name}, got ({', '.join(given)})")


def _no_stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


class Inputs:
    """The streams of a block's arguments: functions of a call's `args` and `kwargs`.

    Attributes:
        hidden: returns `hidden_states`.
        encoder: returns `encoder_hidden_states`, None where the pattern has none as input.
    """

    __slots__ = ("encoder", "hidden", "takes_encoder")

    def __init__(
        self, block: torch.nn.Module, pattern: ForwardPattern, streams: Streams, who: str
    ) -> None:
        self.takes_encoder = ENCODER in pattern.takes
        self.hidden = Stream(block, streams, 0, who)
        self.encoder: Any = Stream(block, streams, 1, who) if self.takes_encoder else _no_stream


class OutputForm:
    """How a block packs its streams into what it returns, learned from one real output.

    Attributes:
        is_tensor: the block returns `hidden_states` alone.
        hidden_at: position of `hidden_states` in the tuple.
        encoder_at: position of `encoder_hidden_states`, None where the pattern returns none. What
            is there may be None: from the last block of a model, or without audio.
    """

    __slots__ = ("encoder_at", "hidden_at", "is_tensor", "rest", "sequence")

    def __init__(self, pattern: ForwardPattern, output: Any, who: str) -> None:
        self.encoder_at: int | None = None
        self.hidden_at = 0
        self.rest: tuple[Any, ...] = ()
        self.sequence: type = type(output)
        self.is_tensor = isinstance(output, torch.Tensor)
        if self.is_tensor:
            fits = len(pattern.returns) == 1 or pattern.takes != (HIDDEN,)
        else:
            fits = isinstance(output, tuple | list) and self._match(pattern, output)
        if not fits:
            raise ValueError(
                f"{who}: a block of {pattern.name} must return ({', '.join(pattern.returns)}), got "
                f"{describe(output)}; give the BlockAdapter the pattern that the block follows"
            )

    def _match(self, pattern: ForwardPattern, output: Any) -> bool:
        """Find the streams in a tuple; say whether it fits the pattern."""
        if len(pattern.returns) == 2 and len(output) == 2:
            self.hidden_at = pattern.returns.index(HIDDEN)
            self.encoder_at = 1 - self.hidden_at
            if not isinstance(output[self.encoder_at], torch.Tensor | None):
                return False
        elif len(pattern.returns) == 2 or any(isinstance(x, torch.Tensor) for x in output[1:]):
            return False
        self.rest = tuple(None if isinstance(x, torch.Tensor) else x for x in output)
        return len(output) > 0 and isinstance(output[self.hidden_at], torch.Tensor)

    def unpack(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (hidden_states, encoder_hidden_states or None) of a block's output."""
        if self.is_tensor:
            return output, None
        encoder = output[self.encoder_at] if self.encoder_at is not None else None
        return output[self.hidden_at], encoder

    def pack(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> Any:
        """Return the streams as the block would."""
        if self.is_tensor:
            return hidden
        output = list(self.rest)
        output[self.hidden_at] = hidden
        if self.encoder_at is not None:
            output[self.encoder_at] = encoder
        return tuple(output) if self.sequence is tuple else output


_under_way = FORWARD.get


class BlockProxy:
    """Stands for one block in the model's loop. Reads of attributes go to the block.

    Args:
        stack: of which the block is a part.
        block: what it stands for.
        who: the block's name in errors.
        place: which of the stack's blocks it is; of those that may be left out one by one, which
            of these.
    """

    __slots__ = ("block", "form", "index", "inputs", "pair", "pattern", "place", "who")

    def __init__(self, stack: Any, block: torch.nn.Module, who: str, place: int) -> None:
        self.index = stack.index
        self.place = place
        self.pattern = stack.pattern
        self.block = block
        self.who = who
        self.form: OutputForm | None = None
        self.pair: tuple[str, str] | None = None
        """Names of the streams in the order of the output, where all are inputs by name."""
        self.inputs = Inputs(block, stack.pattern, stack.streams, who)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the part of the block in the step under way."""
        return self.run(args, kwargs)

    def step(self) -> Any:
        """Return the step that the stack takes in the forward under way; None outside of one."""
        forward = _under_way()
        return None if forward is None else forward.steps[self.index]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block; the first time, learn how it packs its output."""
        output = self.block(*args, **kwargs)
        if self.form is None:
            form = OutputForm(self.pattern, output, self.who)
            if form.encoder_at == 0 and self.inputs.takes_encoder:
                self.pair = self.inputs.encoder.name, self.inputs.hidden.name
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
        forward = _under_way()
        if forward is None:
            return self.block(*args, **kwargs)
        forward.steps[self.index].begin(self.inputs.hidden(args, kwargs))
        return self.run(args, kwargs)


class ProbeEnd(BlockProxy):
    """The last probe block: what it returns is what the probe residual is measured from."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = _under_way()
        if forward is None:
            return self.block(*args, **kwargs)
        step = forward.steps[self.index]
        if self.place == 0:
            step.begin(self.inputs.hidden(args, kwargs))
        output = self.run(args, kwargs)
        form: Any = self.form
        step.probe = output if form.is_tensor else output[form.hidden_at]
        if step.stack.probe_outputs[forward.inputs].are_needed:
            step.copy_probe()
        if step.stack.makes_encoder:
            step.encoder_fn = self.streams(output)[1]
        return output


class SkippedBlock(BlockProxy):
    """A middle block between the first and the last one: the common case, kept short."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = _under_way()
        if forward is not None:
            step = forward.steps[self.index]
            if step.cached:
                pair = self.pair
                if pair is not None and not args:
                    return kwargs[pair[0]], kwargs[pair[1]]
                return self.pass_through(step, args, kwargs)
            if self.form is None:
                return self.run(args, kwargs)
        return self.block(*args, **kwargs)

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

    def __init__(self, stack: Any, block: torch.nn.Module, who: str, place: int) -> None:
        super().__init__(stack, block, who, place)
        self.is_first, self.is_last = place == stack.fn, place == stack.last_middle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = _under_way()
        if forward is None:
            return self.block(*args, **kwargs)
        step = forward.steps[self.index]
        if self.is_first:
            if step.run.source is not None:
                step.run.source.at_block(self.block, args, kwargs)
            step.decide(self.inputs.hidden(args, kwargs), self.inputs.encoder(args, kwargs))
        if not step.cached:
            output = self.run(args, kwargs)
            if self.is_last:
                step.finish_full(*self.streams(output), self.who)
            return output
        if self.is_last:
            return self.pack(*step.finish_cached())
        if self.pair is not None and not args:
            return kwargs[self.pair[0]], kwargs[self.pair[1]]
        return self.pass_through(step, args, kwargs)
