"""Which blocks of a run are skipped on this step, for all of them at once.

In the order of the blocks, with s_i the change from `block_changes` and g_j the growth of block j,

    d_i = s_i * product of g_j over the blocks j < i that run
    block i is skipped if it may be and d_i < threshold

A block that runs does not add what it added when it was stored, so what comes after it changes by
more than s says: by as much more as its output changed than its input when it was last stored, g_j.
Up to the first block that runs d is exact; behind it, it is an estimate, where DBPrune
(github.com/vipshop/cache-dit) waits for each block to measure. The rising threshold is DBPrune's:
m * RELAX, with m the mean of those of the first COUNTED changes of the step that are above 0, if
that is between the threshold and MAX_RELAXED.

Scalar arithmetic, once in Python (the reference) and once as a Triton function; the two agree bit
for bit: each operation is float32, rounded once, in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.constants import Constants
from dbcache.kernels.common.launches import contiguous
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import Impl, without_gradient
from dbcache.kernels.common.sums import (
    Partials,
    check_partials,
    f32,
    lanes_for,
    relative_l1,
    relative_l1_of_partials,
    sums_of_columns,
    total_sums,
)
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.block_state import BLOCKS, BlockState

COUNTED = 5
"""Changes of a step that raise the threshold, at most: the first ones."""
RULE = Constants(globals())


def decide_blocks(partials: Tensor, state: BlockState, *, impl: Impl = "auto") -> None:
    """Write the change of each block, and whether it is skipped, to ``state.decisions``.

    Args:
        partials: float32 (M, B, T, 2) from `block_changes`, T <= MAX_PARTIALS, on the device of
            the state.
        state: state of the run; `changes` and `decisions` are written.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    A change that is NaN is never below a threshold: the block runs. The reference reads the state
    on the host, which synchronises if it is on a GPU; Triton does not.

    Raises:
        ValueError: `partials` does not fit.
    """
    blocks, device = len(state.decisions), state.decisions.device
    check_partials("decide_blocks", partials, device, blocks=blocks)
    _decide_blocks(impl, partials, state)


@without_gradient
def decide_blocks_reference(partials: Tensor, state: BlockState) -> None:
    """Plain Python, the meaning of `decide_blocks`."""
    rule = state.rule.tolist()
    measured = [relative_l1(block, rule[bs.WORST_SAMPLE] > 0) for block in partials.tolist()]
    grown = [total_sums([block]) for block in state.growth_sums.tolist()]
    growth = [f32(num / den) if den > 0 else 1.0 for num, den in grown]
    changes = torch.tensor([measured, growth], dtype=torch.float32, device="cpu").T
    state.changes.copy_(changes)
    pairs = choose_blocks(measured, growth, state.prunable.tolist(), rule)
    state.decisions.copy_(torch.tensor(pairs, dtype=torch.float32, device="cpu"))


def choose_blocks(
    measured: list[float], growth: list[float], prunable: list[int], rule: list[float]
) -> list[tuple[float, int]]:
    """Return (change, 1 if skipped) of each block."""
    threshold, relax, most = rule[bs.THRESHOLD], rule[bs.RELAX], rule[bs.MAX_RELAXED]
    factor, total, seen, count, pairs = 1.0, 0.0, 0, 0, []
    for i, own in enumerate(measured):
        diff, limit = f32(own * factor), threshold
        if relax > 0 and count > 0:
            relaxed = f32(f32(total / count) * relax)
            if relaxed < most:
                limit = max(relaxed, threshold)
        similar = diff == diff if limit >= 1 else diff < limit
        skipped = bool(prunable[i]) and threshold > 0 and similar
        if prunable[i]:
            if seen < COUNTED and diff > 0:
                total, count = f32(total + diff), count + 1
            seen += 1
        if not skipped:
            factor = f32(factor * growth[i])
        pairs.append((diff, int(skipped)))
    return pairs


@op(decide_blocks_reference, like="partials", mutates=("changes", "decisions", "ticket"))
def _decide_blocks(partials, state):
    blocks, samples, programs, _ = partials.shape
    parts = state.growth_sums.shape[1]
    log_lanes, warps = lanes_for(max(programs, parts))
    _decide_blocks_kernel[(blocks,)](
        *contiguous(partials), state.growth_sums, state.prunable, state.rule, state.changes,
        state.decisions, state.ticket, samples, programs, parts,
        LOG_LANES=log_lanes, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "programs", "parts"])
def _decide_blocks_kernel(
    partials_ptr, growth_ptr, prunable_ptr, rule_ptr, changes_ptr, decisions_ptr, ticket_ptr,
    samples, programs, parts, LOG_LANES: tl.constexpr,
):  # fmt: skip
    """Program i adds up the sums of block i; the last to finish decides."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    partials = Partials(partials_ptr + block * samples * programs * 2, samples, programs)
    mean, largest, _, _ = relative_l1_of_partials(partials, LOG_LANES, 2)
    change = tl.where(tl.load(rule_ptr + BLOCKS.WORST_SAMPLE) > 0, largest, mean)
    num, den = tl.split(sums_of_columns(growth_ptr + block * parts * 2, parts, LOG_LANES, 2))
    growth = tl.where(den > 0, tl.div_rn(num, tl.where(den > 0, den, 1.0)), 1.0)
    tl.store(changes_ptr + block * 2, change)
    tl.store(changes_ptr + block * 2 + 1, growth)
    tl.debug_barrier()
    before = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if before == blocks - 1:
        tl.debug_barrier()
        tl.store(ticket_ptr, 0)
        _choose_blocks(changes_ptr, prunable_ptr, rule_ptr, decisions_ptr, blocks)


@triton.jit
def _choose_blocks(changes_ptr, prunable_ptr, rule_ptr, decisions_ptr, blocks):
    """The function `choose_blocks` above, on numbers in memory."""
    threshold = tl.load(rule_ptr + BLOCKS.THRESHOLD)
    relax = tl.load(rule_ptr + BLOCKS.RELAX)
    most = tl.load(rule_ptr + BLOCKS.MAX_RELAXED)
    factor = tl.full((), 1.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    count = tl.full((), 0, tl.int32)
    seen = tl.full((), 0, tl.int32)
    for i in range(blocks):
        diff = tl.load(changes_ptr + 2 * i) * factor
        growth = tl.load(changes_ptr + 2 * i + 1)
        may = tl.load(prunable_ptr + i) != 0
        relaxed = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32)) * relax
        risen = (relax > 0) & (count > 0) & (relaxed < most)
        limit = tl.where(risen, tl.maximum(relaxed, threshold), threshold)
        similar = ((limit >= 1.0) & (diff == diff)) | (diff < limit)
        skipped = may & (threshold > 0) & similar
        counts = may & (seen < RULE.COUNTED) & (diff > 0)
        total = tl.where(counts, total + diff, total)
        count += counts.to(tl.int32)
        seen += may.to(tl.int32)
        factor = tl.where(skipped, factor, factor * growth)
        tl.store(decisions_ptr + 2 * i, diff)
        tl.store(decisions_ptr + 2 * i + 1, skipped.to(tl.float32))
