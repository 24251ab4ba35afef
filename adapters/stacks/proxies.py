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

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dbcache.adapters.blocks.block_list import Entry
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
        self.hidden_at = 0
        self.encoder_at: int | None = None
        self.sequence: type = type(output)
        self.is_tensor = isinstance(output, torch.Tensor)
        parts = output if isinstance(output, tuple | list) else ()
        tensors = {i for i, x in enumerate(parts) if isinstance(x, torch.Tensor)}
        self.rest = [None if i in tensors else x for i, x in enumerate(parts)]
        if self.is_tensor:
            fits = len(pattern.returns) == 1 or pattern.takes != (HIDDEN,)
        elif len(pattern.returns) == 1:
            fits = tensors == {0}
        else:
            self.hidden_at = pattern.returns.index(HIDDEN)
            self.encoder_at = 1 - self.hidden_at
            is_pair = len(parts) == 2 and self.hidden_at in tensors
            fits = is_pair and (self.encoder_at in tensors or parts[self.encoder_at] is None)
        if not fits:
            raise ValueError(
                f"{who}: a block of {pattern.name} must return ({', '.join(pattern.returns)}), got "
                f"{describe(output)}; give the BlockAdapter the pattern that the block follows"
            )

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
        output = self.rest.copy()
        output[self.hidden_at] = hidden
        if self.encoder_at is not None:
            output[self.encoder_at] = encoder
        return tuple(output) if self.sequence is tuple else output


_under_way = FORWARD.get


class BlockProxy:
    """Stands for one block in the model's loop. Reads of attributes go to the block.

    By itself it is a probe or last block on the first forward, whose output is checked.

    Args:
        stack: of which the block is a part.
        block: what it stands for.
        who: the block's name in errors.
        place: position of the block in the stack.

    Attributes:
        index: which of the transformer's stacks it is in.
        hidden_in: returns `hidden_states` of a call's `args` and `kwargs`.
        encoder_in: returns `encoder_hidden_states`; None where the pattern has none as input.
        form: how the block packs its output; None until it has run.
    """

    __slots__ = ("block", "encoder_in", "form", "hidden_in", "index", "pattern", "place", "who")

    def __init__(self, stack: Any, block: torch.nn.Module, who: str, place: int) -> None:
        self.index, self.place, self.pattern = stack.index, place, stack.pattern
        self.block, self.who = block, who
        self.form: Any = None
        self.hidden_in = Stream(block, stack.streams, 0, who)
        takes_encoder = ENCODER in stack.pattern.takes
        self.encoder_in = Stream(block, stack.streams, 1, who) if takes_encoder else None

    def __getattr__(self, name: str) -> Any:
        forward = _under_way()
        if forward is not None:
            forward.steps[self.index].stack.loops[forward.inputs].reads_blocks = True
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
            self.form = OutputForm(self.pattern, output, self.who)
        return output

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return both streams of a call; those that are given by name without a further call."""
        hidden, encoder = kwargs.get(self.hidden_in.name), None
        if hidden is None:
            hidden = self.hidden_in(args, kwargs)
        if self.encoder_in is not None:
            encoder = kwargs.get(self.encoder_in.name)
            if encoder is None:
                encoder = self.encoder_in(args, kwargs)
        return hidden, encoder


class ProbeBlock(BlockProxy):
    """The first block, from whose input the probe residual is measured, or the last probe block.

    What that one returns is what the residual is measured to. They may be the same block.
    """

    __slots__ = ("is_last",)

    def __init__(self, stack: Any, block: torch.nn.Module, who: str, place: int) -> None:
        super().__init__(stack, block, who, place)
        self.is_last = stack.ends_probe(place)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = _under_way()
        if forward is None:
            return self.block(*args, **kwargs)
        step = forward.steps[self.index]
        if self.place == 0:
            step.begin(self.hidden_in(args, kwargs))
        output = self.block(*args, **kwargs) if self.form else self.run(args, kwargs)
        if self.is_last:
            form = self.form
            step.probe = output if form.is_tensor else output[form.hidden_at]
            if step.stack.loops[forward.inputs].are_needed:
                step.returned, step.probe = step.probe, step.probe.clone()
            if step.stack.makes_encoder:
                step.encoder_fn = form.unpack(output)[1]
        return output


class MiddleBlock(BlockProxy):
    """A middle block: the first one decides, the last one predicts or stores; see `Loop`."""

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
            hidden, encoder = self.given(args, kwargs)
            step.decide(hidden, encoder)
        if not step.cached:
            output = self.run(args, kwargs)
            if self.is_last:
                step.finish_full(*self.form.unpack(output), self.who)
            return output
        if self.is_last:
            return self.form.pack(*step.finish_cached())
        if self.is_first and encoder is not None and self.form.encoder_at == 0:
            return encoder, hidden
        return self.pass_through(step, args, kwargs)

    def pass_through(self, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the inputs as the block would return its outputs."""
        if self.form.is_tensor:
            return self.hidden_in(args, kwargs)
        hidden, encoder = self.given(args, kwargs)
        return self.form.pack(hidden, step.encoder_fn if self.encoder_in is None else encoder)


def _passing(proxy: MiddleBlock) -> Callable[..., Any]:
    """Return what does as `proxy` on a cached step: a function, or itself, where it asks the step.

    The form of its output is known.
    """
    hidden, at = proxy.hidden_in.name, proxy.hidden_in.at

    def skip_one(*args: Any, **kwargs: Any) -> Any:
        if hidden in kwargs:
            return kwargs[hidden]
        return args[at] if at < len(args) else proxy.pass_through(None, args, kwargs)

    if proxy.form.is_tensor:
        return skip_one
    if proxy.encoder_in is None or proxy.form.encoder_at != 0:
        return proxy
    encoder = proxy.encoder_in.name

    def skip_two(*args: Any, **kwargs: Any) -> Any:
        return proxy.pass_through(None, args, kwargs) if args else (kwargs[encoder], kwargs[hidden])

    return skip_two


_Fast = tuple[list[Entry], list[Entry], list[Entry]]
"""What a loop calls on full steps, on cached ones, and on cached ones if it only calls blocks."""


class Loop(list[Entry]):
    """What stands for the blocks of one list, in their order: an entry for each.

    A proxy asks at each call what its block is to do. Once a step is decided, all blocks between
    the first and the last middle one do the same, so a loop is given what costs less to call: on a
    full step the blocks themselves, on a cached one plain functions that return what they are
    given. These do not have the attributes of blocks. So loops that read attributes go through
    proxies on cached steps, as all do on the first step with a set of inputs, which shows it.
    A loop that only calls its blocks is given none that it need not call.

    Args:
        row: an entry for each block.
        path: of the list, seen from the model.
    """

    __slots__ = ("_before", "_fast", "_index", "_middle", "_rest", "path")

    def __init__(self, row: list[Entry], path: str) -> None:
        super().__init__(row)
        self.path = path
        proxies = [(i, entry) for i, entry in enumerate(row) if type(entry) is MiddleBlock]
        at = [i for i, entry in proxies if not (entry.is_first or entry.is_last)]
        begin, end = (at[0], at[-1] + 1) if at else (0, 0)
        self._before, self._rest = row[:begin], row[begin:]
        middle: list[Any] = row[begin:end]
        self._middle, self._index = middle, middle[0].index if at else 0
        self._fast: _Fast | None = None

    def __iter__(self) -> Iterator[Entry]:
        forward = _under_way() if self._middle else None
        if forward is None:
            return super().__iter__()
        if not self._before:
            return iter(self._now(forward))
        # what follows is asked for when all before it was called
        rest = itertools.chain.from_iterable(map(self._now, (forward,)))
        return itertools.chain(self._before, rest)

    def _now(self, forward: Any) -> list[Entry]:
        """Return what stands for the blocks from the first middle one on, in the forward's step."""
        step = forward.steps[self._index]
        known = step.stack.loops[forward.inputs]
        if not (step.awaits_end and known.is_seen):
            return self._rest
        fast = self._fast or self._learn_fast()
        if fast is None:
            return self._rest
        blocks, passing, called = fast
        if not step.cached:
            return blocks
        if known.reads_blocks:
            return self._rest
        needs = forward.loops.get(self.path)
        if needs is None or torch.is_grad_enabled():
            return passing
        only_calls = not needs or (not forward.given[0] and needs.isdisjoint(forward.inputs))
        return called if only_calls else passing

    def _learn_fast(self) -> _Fast | None:
        """Find what costs less to call; None before the blocks have run once."""
        if any(proxy.form is None for proxy in self._middle):
            return None
        after = self._rest[len(self._middle) :]
        blocks = [proxy.block for proxy in self._middle]
        passing = [*map(_passing, self._middle), *after]
        # one turn at least, which leaves its results to what follows the loop
        called = after if after or self._before else passing[-1:]
        self._fast = [*blocks, *after], passing, called
        return self._fast
