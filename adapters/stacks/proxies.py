"""Guards: what the model's own loop iterates in place of its blocks while the cache is on.

There is one entry per block, in the same order and number. Probe (Fn) and tail (Bn) blocks stand
for themselves; the others are guards: plain callables that call their block on a full step and
pass their inputs through on a cached one. The decision is taken where the skipping begins, at the
first middle guard; the last one returns the prediction. So whatever the model does between its
blocks keeps working, and what it does to passed-through values is discarded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dbcache.adapters.blocks.patterns import ENCODER, ForwardPattern, OutputForm, Streams, describe

if TYPE_CHECKING:
    from dbcache.adapters.stacks.stack import Stack


class Inputs:
    """Finds the streams among the arguments of a block; the signature is read once."""

    __slots__ = ("encoder_at", "encoder_name", "hidden_at", "hidden_name", "takes_encoder", "who")

    def __init__(
        self, block: torch.nn.Module, pattern: ForwardPattern, streams: Streams, who: str
    ) -> None:
        self.who = who
        self.takes_encoder = ENCODER in pattern.takes
        self.hidden_name, self.encoder_name = streams
        names = parameter_names(block)
        self.hidden_at, self.encoder_at = (
            names.index(name) if name in names else position
            for position, name in enumerate(streams)
        )

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Return `hidden_states`."""
        if self.hidden_name in kwargs:
            return kwargs[self.hidden_name]
        if self.hidden_at < len(args):
            return args[self.hidden_at]
        return self._missing(self.hidden_name, args, kwargs)

    def encoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Return `encoder_hidden_states`, None where the pattern has none as input."""
        if not self.takes_encoder:
            return None
        if self.encoder_name in kwargs:
            return kwargs[self.encoder_name]
        if self.encoder_at < len(args):
            return args[self.encoder_at]
        return self._missing(self.encoder_name, args, kwargs)

    def _missing(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [describe(value) for value in args] + sorted(kwargs)
        raise ValueError(f"{self.who}: must be called with {name}, got ({', '.join(given)})")


def forward_of(block: torch.nn.Module) -> Callable[..., Any]:
    """Return a block's forward: that of the instance if it names its parameters, else its class's.

    Hooks put a wrapper there that takes anything; a patch puts a forward with names there.
    """
    block = getattr(block, "_orig_mod", block)  # torch.compile's wrapper
    own = block.__dict__.get("forward")
    if own is not None:
        kinds = {parameter.kind for parameter in inspect.signature(own).parameters.values()}
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            return inspect.unwrap(own)
    return type(block).forward.__get__(block)


def parameter_names(block: torch.nn.Module) -> list[str]:
    """Return the names of the parameters of a block's forward, without `self`."""
    return list(inspect.signature(forward_of(block)).parameters)


class Guard:
    """Stands for one block in the model's loop. Reads of attributes go to the block."""

    __slots__ = ("block", "form", "inputs", "stack", "swaps_pair", "who")

    def __init__(self, stack: Stack, block: torch.nn.Module, who: str) -> None:
        self.stack = stack
        self.block = block
        self.who = who
        self.form: OutputForm | None = None
        self.swaps_pair = False
        self.inputs = Inputs(block, stack.pattern, stack.streams, who)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block; the first time, learn how it packs its output."""
        output = self.block(*args, **kwargs)
        if self.form is None:
            self.form = OutputForm(self.stack.pattern, output, self.who)
            self.swaps_pair = self.form.encoder_at == 0 and self.inputs.takes_encoder
        return output

    def streams(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the streams of the block's output."""
        assert self.form is not None
        return self.form.unpack(output)

    def pack(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> Any:
        """Return the streams as the block would."""
        assert self.form is not None
        return self.form.pack(hidden, encoder)


class CheckGuard(Guard):
    """A probe or tail block on the first forward: checks its output against the pattern."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)


class FirstGuard(Guard):
    """The first block: what comes in is what the probe residual is measured from."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.stack.begin(self.inputs.hidden(args, kwargs))
        return self.run(args, kwargs)


class ProbeEndGuard(Guard):
    """The last probe block where the encoder stream is something that blocks only return."""

    __slots__ = ("is_first",)

    def __init__(self, stack: Stack, block: torch.nn.Module, who: str, is_first: bool) -> None:
        super().__init__(stack, block, who)
        self.is_first = is_first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_first:
            self.stack.begin(self.inputs.hidden(args, kwargs))
        output = self.run(args, kwargs)
        self.stack.encoder_fn = self.streams(output)[1]
        return output


class MiddleGuard(Guard):
    """A skippable block between the first and the last one: the common case, kept short."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.stack.cached:
            return self.run(args, kwargs)
        if self.swaps_pair and not args:
            return kwargs[self.inputs.encoder_name], kwargs[self.inputs.hidden_name]
        return self.pass_through(args, kwargs)

    def pass_through(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the inputs as the block would return its outputs."""
        hidden = self.inputs.hidden(args, kwargs)
        if self.form is not None and self.form.is_tensor:
            return hidden
        if self.inputs.takes_encoder:
            return self.pack(hidden, self.inputs.encoder(args, kwargs))
        return self.pack(hidden, self.stack.encoder_fn)


class MiddleEndGuard(MiddleGuard):
    """The first middle block, which decides, or the last one, which predicts or stores; or both."""

    __slots__ = ("is_first", "is_last")

    def __init__(
        self, stack: Stack, block: torch.nn.Module, who: str, is_first: bool, is_last: bool
    ) -> None:
        super().__init__(stack, block, who)
        self.is_first = is_first
        self.is_last = is_last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack
        if self.is_first:
            if stack.source is not None:
                stack.source.at_block(self.block, args, kwargs)
            stack.decide(self.inputs.hidden(args, kwargs), self.inputs.encoder(args, kwargs))
        if not stack.cached:
            output = self.run(args, kwargs)
            if self.is_last:
                stack.finish_full(*self.streams(output), self.who)
            return output
        if self.is_last:
            return self.pack(*stack.finish_cached())
        return self.pass_through(args, kwargs)
