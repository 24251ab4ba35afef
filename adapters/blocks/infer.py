"""Learns from one forward what blocks take and return, where their source does not tell.

While the model runs as it is, an observer per block compares the tensors that a block gets with
those that the block before it returned: that is which parameter is a stream, and in which order the
block returns them. Names do not matter, except that of two streams the one called `hidden_states`
(or as `BlockAdapter.streams` says) is the hidden states, else the one that all blocks return, else
the larger one, else the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dbcache.adapters.blocks.patterns import STREAMS, ForwardPattern, Streams, describe
from dbcache.adapters.blocks.signature import parameter_names
from dbcache.adapters.blocks.spec import StackSpec, TransformerSpec
from dbcache.adapters.blocks.views import run_seeing, shown
from dbcache.notices import say


def learn(
    spec: TransformerSpec,
    views: Any,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, list[StackSpec | None]]:
    """Run a forward; return its output and the stacks with their patterns, in the same order.

    None stands for lists that are no chain of blocks: they were not run, or what a block returns is
    not what the next one takes. Where they nearly are, a warning says what is in the way.

    Raises:
        ValueError: no list is a chain of blocks.
    """
    chains = {i: _Chain(stack) for i, stack in enumerate(spec.stacks) if stack.pattern is None}
    pairs = [(chain, block_list) for chain in chains.values() for block_list in chain.stack.lists]
    entries: Any = [[_Observer(chain, block) for block in its.blocks] for chain, its in pairs]
    over = shown([block_list for _, block_list in pairs], entries, spec.transformer)
    output = run_seeing(views, over, over, lambda: run(*args, **kwargs))
    learned = [chains[i].learned() if i in chains else s for i, s in enumerate(spec.stacks)]
    failed = [chain for chain in chains.values() if chain.reason]
    if not any(learned):
        reasons = [f"{chain.stack.name}: {chain.reason}" for chain in failed]
        raise ValueError(
            f"BlockAdapter(auto=True): {type(spec.transformer).__name__} must have blocks of which "
            f"each takes what the one before returned, got none ({'; '.join(reasons)}); name the "
            f"lists and their pattern as BlockAdapter(blocks=..., forward_pattern=...)"
        )
    for chain in failed:
        if chain.fed:
            name = chain.stack.name
            say(f"BlockAdapter(auto=True): {name} is not cached: a block {chain.reason}")
    return output, learned


class _Observer:
    """Stands for one block while a chain is learned. Reads of attributes go to the block."""

    def __init__(self, chain: _Chain, block: torch.nn.Module) -> None:
        self.chain = chain
        self.block = block
        self.names = parameter_names(block)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self.names, args, strict=False)) | kwargs
        taken = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
        self.chain.note_inputs(taken)
        output = self.block(*args, **kwargs)
        self.chain.note_output(output, taken, self.names)
        return output


class _Chain:
    """What is known so far of the blocks of one stack.

    Attributes:
        fed: which parameter of the next block takes the output at a position.
        reason: why this is no chain of blocks, None if it is one.
    """

    def __init__(self, stack: StackSpec) -> None:
        self.stack = stack
        self.fed: dict[int, str] = {}
        self.reason: str | None = None
        self._names: list[str] = []
        self._form: Any = None
        self._count = 0
        self._sizes: dict[int, int] = {}  # numbers of elements of the tensors among the outputs
        self._ended: set[int] = set()  # positions at which a block returned None
        self._taken: dict[str, torch.Tensor] = {}
        self._output: dict[int, torch.Tensor] = {}

    def note_inputs(self, taken: dict[str, torch.Tensor]) -> None:
        """Find what the last block returned among what the next one takes."""
        for position, x in self._output.items():
            found = [name for name, given in taken.items() if given is x]
            if not found:  # the loop may have added to it: it is what is new and fits
                found = [name for name, given in taken.items() if self._may_be(x, name, given)]
            if len(found) == 1 and self.fed.setdefault(position, found[0]) != found[0]:
                self.reason = f"output {position} goes to {self.fed[position]} and to {found[0]}"

    def _may_be(self, x: torch.Tensor, name: str, given: torch.Tensor) -> bool:
        is_other = any(given is other for other in self._output.values())
        is_new = given is not self._taken.get(name) and not is_other
        return is_new and (given.shape, given.dtype) == (x.shape, x.dtype)

    def note_output(self, output: Any, taken: dict[str, torch.Tensor], names: list[str]) -> None:
        """Keep what a block returned until the next one runs."""
        outputs = dict(enumerate(output if isinstance(output, tuple | list) else (output,)))
        self._output = {at: x for at, x in outputs.items() if isinstance(x, torch.Tensor)}
        self._taken = taken
        self._ended |= {at for at, x in outputs.items() if x is None}
        if self._form is None:
            self._form, self._names, self._count = describe(output), names, len(outputs)
            self._sizes = {at: x.numel() for at, x in self._output.items()}

    def learned(self) -> StackSpec | None:
        """Return the stack with the pattern that was seen, None with a `reason`."""
        self._taken, self._output = {}, {}
        self.reason = self.reason or self._what_is_in_the_way()
        if self.reason is not None:
            return None
        order = sorted(self.fed, key=self._rank)
        roles = dict(zip(order, STREAMS, strict=False))
        returns = tuple(roles[position] for position in sorted(order))
        pattern = ForwardPattern((STREAMS[: len(order)], returns))
        streams = Streams(*(self.fed[position] for position in order))
        return replace(self.stack, pattern=pattern, streams=streams)

    def _rank(self, position: int) -> tuple[Any, ...]:
        """Return what is least for the hidden states."""
        name, size = self.fed[position], self._sizes[position]
        is_other = name != self.stack.streams[0]
        return is_other, position in self._ended, -size, self._names.index(name)

    def _what_is_in_the_way(self) -> str | None:
        if self._form is None:
            return "was not run"
        if not self.fed:
            return f"returns {self._form}, which the next block does not take"
        if self.fed.keys() != self._sizes.keys() or len(set(self.fed.values())) != len(self.fed):
            return f"returns {self._form}, of which the next block takes {sorted(self.fed)}"
        fits = set(self.fed) == {0} or len(self.fed) == self._count == 2
        if not fits or not set(self.fed.values()) <= set(self._names):
            return f"returns {self._form}, which no ForwardPattern describes"
        return None
