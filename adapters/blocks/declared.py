"""What diffusers declares of its blocks, for its own hooks: `TransformerBlockRegistry`."""

from __future__ import annotations

import sys
from typing import Any

import torch

from dbcache.adapters.blocks.patterns import ENCODER, HIDDEN, ForwardPattern, Streams
from dbcache.adapters.blocks.signature import parameter_names, unwrap


def declared(block: torch.nn.Module) -> tuple[ForwardPattern, Streams] | None:
    """Return the pattern of a block and the names of its streams; None where nothing says it.

    One returned stream is `HIDDEN_TO_HIDDEN`, whether or not the block also takes encoder states.
    """
    metadata = _metadata(type(unwrap(block)))
    if metadata is None or metadata.return_hidden_states_index is None:
        return None
    streams = Streams(
        metadata.hidden_states_argument_name, metadata.encoder_hidden_states_argument_name
    )
    names = parameter_names(block)
    if streams.hidden not in names:  # a forward of the instance
        return None
    if metadata.return_encoder_hidden_states_index is None:
        return ForwardPattern.HIDDEN_TO_HIDDEN, streams
    is_first = metadata.return_hidden_states_index < metadata.return_encoder_hidden_states_index
    takes = (HIDDEN, ENCODER) if streams.encoder in names else (HIDDEN,)
    returns = (HIDDEN, ENCODER) if is_first else (ENCODER, HIDDEN)
    return ForwardPattern((takes, returns)), streams


def _metadata(cls: Any) -> Any:
    """Return what diffusers knows of a class of blocks or of a base of it, None without."""
    if "diffusers" not in sys.modules:  # its blocks would have imported it
        return None
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry
    except ImportError:  # a version that keeps it elsewhere
        return None
    for base in cls.__mro__[:-1]:
        try:
            return TransformerBlockRegistry.get(base)
        except ValueError:  # it has no other way to ask
            continue
    return None
