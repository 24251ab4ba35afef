"""What is stored of a run of blocks, so that single ones can be left out.

Memory: two tensors of the size of `hidden_states` per block between the first and the last one that
may be left out, and one of the size of `encoder_hidden_states` where blocks return them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from dbcache.kernels.pruning.add_residuals import add_residuals
from dbcache.kernels.pruning.block_changes import block_changes
from dbcache.kernels.pruning.block_state import NUM_RULE, BlockState
from dbcache.kernels.pruning.decide_blocks import decide_blocks
from dbcache.kernels.pruning.store_block import store_block
from dbcache.lanes.buffers import HostCopy, Streams, outside_inference_mode
from dbcache.lanes.forms import Dtypes, returned_as, stored_dtype, widened
from dbcache.lanes.sharding import Sharding


class BlockStore:
    """The stored inputs and residuals of a run of blocks.

    Args:
        prunable: which of them may be left out.
        device: of the blocks.

    Attributes:
        rule: the numbers of `block_state` that `decide_blocks` goes by, on the device: one tensor
            for the states of all layouts. At first no block is left out.
        state: what is stored; None until the first block is.
        returned: dtypes of the streams as each block returns them, where the stored ones differ.
    """

    @outside_inference_mode
    def __init__(self, prunable: Sequence[bool], device: torch.device) -> None:
        self.prunable = list(prunable)
        self.rule = torch.zeros(NUM_RULE, dtype=torch.float32, device=device)
        self.state: BlockState | None = None
        self.returned: dict[int, Dtypes] = {}
        self._host = HostCopy()

    def move(self, device: torch.device) -> None:
        """Move the rule to another device and drop what is stored."""
        self.rule = self.rule.to(device)
        self.state, self._host = None, HostCopy()

    def tensors(self) -> list[torch.Tensor | None]:
        """Return the rule, and what is stored."""
        stored = () if self.state is None else fields(self.state)
        return [self.rule, *(getattr(self.state, field.name) for field in stored)]

    def measure(self, h: torch.Tensor) -> torch.Tensor:
        """Return the partial sums of how much each block's input changed, given the first one's."""
        assert self.state is not None
        h = h.to(self.state.inputs.dtype)
        return block_changes(h, self.state.inputs, self.state.residuals, self.state.stamps)

    def choose(self, partials: torch.Tensor, sharding: Sharding | None = None) -> torch.Tensor:
        """Return (M, 2) on the device: each block's change, and 1 where it can be left out.

        Args:
            partials: what `measure` gave.
            sharding: ranks that each have a part of the tokens decide alike, by one message.
        """
        assert self.state is not None
        state = self.state
        if sharding is not None:
            blocks, samples = partials.shape[:2]
            sums = torch.cat([partials.sum(2).flatten(0, 1), state.growth_sums.sum(1)])
            sums = sharding.vote(sums[:, None], per_sample=True)
            partials = sums[: blocks * samples].unflatten(0, (blocks, samples))
            state = replace(state, growth_sums=sums[blocks * samples :])
        decide_blocks(partials, state)
        return state.decisions

    def read(self, flags: torch.Tensor) -> list[bool]:
        """Return on the host which blocks are left out. The only host wait of a step."""
        if flags.is_cuda:
            flags = self._host.read(flags)
        return [bool(flag) for flag in flags.tolist()]

    def store(self, index: int, due: torch.Tensor, before: Streams, after: Streams) -> None:
        """Store the input and the residual of block `index`, if the step's `due` says so."""
        (h_in, encoder_in), (h_out, encoder_out) = before, after
        if encoder_in is None or encoder_out is None:
            encoder_in = encoder_out = None
        state = self.state or self.allocate(h_out, encoder_out)
        returned = h_out.dtype, None if encoder_out is None else encoder_out.dtype
        dtype, added = state.inputs.dtype, state.encoder_residuals
        h_in, h_out = h_in.to(dtype), h_out.to(dtype)
        if added is None:
            encoder_in = encoder_out = None
        elif encoder_in is not None and encoder_out is not None:
            encoder_in = widened(encoder_in.to(added.dtype), added.shape[1:])
            encoder_out = encoder_out.to(added.dtype)
        if returned != (dtype, None if encoder_out is None else encoder_out.dtype):
            self.returned[index] = returned
        store_block(state, due, index, h_in, h_out, encoder_in, encoder_out)

    @outside_inference_mode
    def allocate(self, h: torch.Tensor, encoder: torch.Tensor | None) -> BlockState:
        """Allocate the tensors of all blocks, for streams as they return them."""
        h = h.to(stored_dtype(h.dtype))
        encoder = None if encoder is None else encoder.to(stored_dtype(encoder.dtype))
        self.returned = {}
        self.state = BlockState.allocate(h, encoder, self.prunable, self.rule)
        return self.state

    def replace(self, first: int, count: int, streams: Streams) -> Streams:
        """Return the predicted output of blocks `first` to ``first + count - 1``."""
        assert self.state is not None
        added, residuals = self.state.encoder_residuals, self.state.residuals
        h, encoder = streams[0].to(residuals.dtype), streams[1]
        if encoder is None or added is None:
            h, _ = add_residuals(h, residuals, first, count)
        else:
            encoder = widened(encoder.to(added.dtype), added.shape[1:])
            h, encoder = add_residuals(h, residuals, first, count, encoder, added)
        returned = self.returned.get(first + count - 1)
        return (h, encoder) if returned is None else returned_as(returned, h, encoder)

    def nbytes(self) -> int:
        """Bytes of the stored streams."""
        return 0 if self.state is None else self.state.nbytes
