"""What a row of the table of models holds, and the notation for block stacks in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dbcache.adapters.blocks.patterns import ENCODER, HIDDEN, STREAMS, ForwardPattern, Streams
from dbcache.adapters.blocks.spec import Fills, StackSpec

StackRow = tuple[tuple[str, ...], StackSpec]
"""Paths of the lists of a block stack, in the order of the forward, and the stack without them."""

SHORT = {"h": HIDDEN, "e": ENCODER}
"""What rows write for the usual names of the two streams."""


@dataclass(frozen=True)
class ModelRow:
    """One transformer class.

    Attributes:
        transformer: class name in diffusers.
        models: what users call the models that have it.
        blocks: its block stacks, in the notation of `parse_stacks`; what its row stands under in
            the table.
        separate_cfg: called without a pipeline, and without names, calls alternate between two
            guidance branches.
        fills: tells by the keyword arguments of a call that it is no denoising step: its blocks
            keep keys and values for the loop that follows.
        long_skips: the last blocks take what the first ones made, the last of all from the first.
        controlnet: a test adds the residuals of a ControlNet.
    """

    transformer: str
    models: str
    blocks: str = ""
    separate_cfg: bool = False
    fills: Fills | None = None
    long_skips: bool = False
    controlnet: bool = False

    @cached_property
    def stacks(self) -> tuple[StackRow, ...]:
        """Its block stacks, as `parse_stacks` reads them."""
        return parse_stacks(self.blocks)


def parse_stacks(text: str) -> tuple[StackRow, ...]:
    """Read ``"<list> + <list>: <takes> -> <returns>; <list>: <takes> -> <returns>"``.

    Lists joined by ``+`` are a chain with one decision, lists joined by ``&`` take turns in one,
    ``;`` separates stacks. ``blocks[:-n]`` are all but the last n blocks and ``blocks[-n:]`` these,
    n being an attribute of the transformer. The streams go by the names of the block's parameters,
    hidden states first in what it takes; ``h`` and ``e`` stand for `hidden_states` and
    `encoder_hidden_states`. For example

        double_blocks: h, e -> e, h; single_blocks: x -> x

    The stacks come with the paths of their lists, which are still to be found in a transformer.

    Raises:
        ValueError: it reads differently.
    """
    return tuple(_parse_stack(part) for part in text.split(";"))


def _parse_stack(text: str) -> StackRow:
    lists, _, signature = text.rpartition(":")
    taken, _, returned = signature.partition("->")
    takes, returns = _names(taken), _names(returned)
    names = list(dict.fromkeys(takes + returns))
    role = dict(zip(names, STREAMS, strict=False)).get
    value = tuple(map(role, takes)), tuple(map(role, returns))
    pattern = next((pattern for pattern in ForwardPattern if pattern.value == value), None)
    interleaved = "&" in lists
    chain = tuple(name.strip() for name in lists.split("&" if interleaved else "+"))
    if pattern is None or not all((*names, *chain)):
        raise ValueError(
            f"parse_stacks: each stack must read '<list>: <takes> -> <returns>' with one or two "
            f"streams, as in 'blocks: h, e -> e, h', got {text.strip()!r}"
        )
    return chain, StackSpec((), pattern, Streams(*names), interleaved)


def _names(text: str) -> list[str]:
    return [SHORT.get(name.strip(), name.strip()) for name in text.split(",")]
