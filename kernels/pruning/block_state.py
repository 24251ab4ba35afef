"""What is stored of each block of a run, so that single blocks can be skipped.

Per block: the hidden states that it was called with when it was last stored, what it added to them
(and to the encoder states), the step of that, and by how much it let a change of its input grow. So
a run of M blocks holds 2 M tensors of the size of `hidden_states`, and M of `encoder_hidden_states`
where the blocks return them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbcache.kernels.common.checks import check_tensor
from dbcache.kernels.common.constants import Constants
from dbcache.kernels.common.lane_state import LaneState
from dbcache.kernels.common.select import Impl, select
from dbcache.kernels.common.sums import partition_of

# entries of BlockState.rule, float32
THRESHOLD = 0  # a block is skipped below this change; <= 0 never, >= 1 always
RELAX = 1  # > 0: the threshold rises to this times the mean of the first changes of the step
MAX_RELAXED = 2  # but not to this or more
WORST_SAMPLE = 3  # 1: the sample that changed most counts, 0: the batch as a whole
NUM_RULE = 4

# entries of BlockSteps.store, int32
EVERY = 0  # blocks are stored on steps 0, EVERY, 2 * EVERY, ..., and when nothing is stored yet
DUE = 1  # on the latest step: 0 nothing is stored, 1 for the first time, 2 again
STAMP = 2  # that step; the one on which blocks were last stored, where `decide_tail` says it
NUM_STORE = 3

BLOCKS = Constants(globals())
"""The constants above, for kernels."""


def check_decisions(op: str, decisions: Tensor, flags: Tensor) -> None:
    """Raise unless `decisions` are as `decide_blocks` leaves them for the blocks of `flags`."""
    shape = (flags.shape[0], 2)
    check_tensor(op, "decisions", decisions, torch.float32, shape, flags.device)


@dataclass(slots=True, eq=False)
class BlockState:
    """The tensors of a run of M blocks, all on one device, contiguous. Make one with `allocate`."""

    inputs: Tensor
    """(M, *shape): hidden states before each block, when it was last stored"""
    residuals: Tensor
    """(M, *shape): what each block added to them"""
    encoder_residuals: Tensor | None
    """(M, *encoder shape): what each block added to the encoder states, 0 for one that returns
    none"""
    stamps: Tensor
    """int32 (M,): step at which each block was last stored"""
    growth_sums: Tensor
    """float32 (M, T, 2): partial sums of how much each block's output and input changed"""
    prunable: Tensor
    """int32 (M,): 1 for a block that may be skipped"""
    rule: Tensor
    """float32 (NUM_RULE,)"""
    changes: Tensor
    """float32 (M, 2), for `decide_blocks`: change and growth of each block"""
    decisions: Tensor
    """float32 (M, 2): the change that was compared, and 1 for a block that is skipped, else 0"""
    ticket: Tensor
    """int32 (1,): programs of `decide_blocks` that are done; 0 between launches"""

    @classmethod
    def allocate(
        cls,
        h: Tensor,
        encoder: Tensor | None,
        prunable: Sequence[bool],
        rule: Tensor | Sequence[float],
        impl: Impl = "auto",
    ) -> "BlockState":
        """Return the state of ``len(prunable)`` blocks of which nothing is stored yet.

        Args:
            h: hidden states as the blocks are called with.
            encoder: encoder states as they return them, None if they return none.
            prunable: which of them may be skipped.
            rule: NUM_RULE numbers; a float32 tensor of them, on the device, is taken as it is.
            impl: as in the ops that are to run on it.
        """
        count, device = len(prunable), h.device
        programs = partition_of(h.numel())[1] if select(impl, h) == "triton" else 1
        may_skip = torch.tensor(prunable, dtype=torch.int32, device=device)
        changes = torch.zeros(count, 2, dtype=torch.float32, device=device)
        # a block that returns no encoder states adds nothing to them
        added = None if encoder is None else encoder.new_zeros((count, *encoder.shape))
        return cls(
            inputs=h.new_empty((count, *h.shape)),
            residuals=h.new_empty((count, *h.shape)),
            encoder_residuals=added,
            stamps=torch.zeros_like(may_skip),
            growth_sums=changes.new_zeros(count, programs, 2),
            prunable=may_skip,
            rule=torch.as_tensor(rule, dtype=torch.float32, device=device),
            changes=changes,
            decisions=torch.zeros_like(changes),
            ticket=may_skip.new_zeros(1),
        )

    def fits(self, h: Tensor, encoder: Tensor | None) -> bool:
        """Whether blocks with these streams can be stored; encoder states only if there is room."""
        pairs = ((h, self.inputs), (encoder, self.encoder_residuals))
        both = [(x, kept) for x, kept in pairs if x is not None and kept is not None]
        return all((x.shape, x.device) == (kept.shape[1:], kept.device) for x, kept in both)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that have the size of a stream."""
        streams = (self.inputs, self.residuals, self.encoder_residuals)
        return sum(x.nbytes for x in streams if x is not None)


@dataclass(slots=True, eq=False)
class BlockSteps(LaneState):
    """A lane's state that says of each of M blocks whether a step skips it.

    Ring, weights and accumulated change are not used.
    """

    prunable: Tensor
    """int32 (M,): 1 for a block that may be skipped"""
    flags: Tensor
    """int32 (M,): 1 for a block that is skipped on the latest step"""
    store: Tensor
    """int32 (NUM_STORE,): what `store_block` does on the latest step"""
    trace: Tensor
    """int32 (capacity, M): `flags` of each step"""

    @classmethod
    def allocate(  # type: ignore[override]
        cls, capacity: int, prunable: Sequence[bool], device: torch.device | str
    ) -> "BlockSteps":
        """Return the state of a new request of at most `capacity` steps, see `LaneState`."""
        may_skip = torch.tensor(prunable, dtype=torch.int32, device=device)
        store, trace = may_skip.new_zeros(NUM_STORE), may_skip.new_zeros(capacity, len(prunable))
        store[EVERY] = 1
        lane = LaneState.allocate(capacity, device).tensors()
        tensors = (*lane, may_skip, torch.zeros_like(may_skip), store, trace)
        return cls(*tensors)._with_reset()

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` steps, as `LaneState.grow`."""
        extra = capacity - self.capacity
        if extra > 0:
            self.trace = torch.nn.functional.pad(self.trace, (0, 0, 0, extra))
            LaneState.grow(self, capacity)
