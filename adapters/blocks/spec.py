"""What is known of a transformer: its block stacks, as found in the table or in an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dbcache.adapters.blocks.block_list import BlockList
from dbcache.adapters.blocks.patterns import STREAMS, ForwardPattern, Streams
from dbcache.config.cache import ParamsModifier

Fills = Callable[[dict[str, Any]], bool]
"""Tells by the keyword arguments of a call that it is no denoising step."""


@dataclass(frozen=True)
class StackSpec:
    """One block stack of one transformer: a chain of lists under one pattern.

    `pattern` is None where the first forward has to tell it (`infer`). With `interleaved` the
    forward runs a block of each list in turn; with `long_skips` the j-th block from the end takes
    what the j-th block made.
    """

    lists: tuple[BlockList, ...]
    pattern: ForwardPattern | None
    streams: Streams = STREAMS
    interleaved: bool = False
    long_skips: bool = False
    modifier: ParamsModifier | None = None

    @property
    def name(self) -> str:
        """The paths of its lists, with + in between."""
        return "+".join(block_list.path for block_list in self.lists)


@dataclass(frozen=True)
class TransformerSpec:
    """One transformer and its block stacks.

    `fills` tells by the keyword arguments of a call that it is no denoising step: its blocks keep
    keys and values for the loop that follows, so all of them must run.
    """

    transformer: torch.nn.Module
    stacks: tuple[StackSpec, ...]
    separate_cfg: bool = False
    fills: Fills | None = None

    def twin(self) -> TransformerSpec:
        """Return the same with lists of its own, for stacks that read them when they run."""
        stacks = tuple(replace(one, lists=tuple(map(copy.copy, one.lists))) for one in self.stacks)
        return replace(self, stacks=stacks)
