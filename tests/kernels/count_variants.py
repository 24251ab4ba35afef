"""Count the variants of each kernel that ten resolutions and fifty steps would compile, as JSON.

Run by test_variants.py in a process of its own, without Triton's interpreter.
"""

import json

import torch

from bench.stubbed_triton import stubbed_triton
from dbcache.kernels.by_row.commit_rows import commit_rows
from dbcache.kernels.by_row.decide_rows import decide_rows
from dbcache.kernels.by_row.predict_rows import predict_rows
from dbcache.kernels.by_row.table import Row, Rows
from dbcache.kernels.common.lane_state import LaneState
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.decision.share_change import make_stamps, share_change
from dbcache.kernels.decision.transformation_rate import transformation_rate
from dbcache.kernels.distributed.fp8_pack import fp8_pack, fp8_unpack
from dbcache.kernels.distributed.merge_attention import merge_attention
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.fit_recurrence import fit_recurrence
from dbcache.kernels.prediction.predict import predict
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.add_residuals import add_residuals
from dbcache.kernels.pruning.block_changes import block_changes
from dbcache.kernels.pruning.block_state import BlockState, BlockSteps
from dbcache.kernels.pruning.decide_blocks import decide_blocks
from dbcache.kernels.pruning.decide_step import decide_step
from dbcache.kernels.pruning.decide_tail import decide_tail
from dbcache.kernels.pruning.store_block import store_block

TOKENS = (1, 16, 17, 80, 256, 1000, 1024, 1025, 4608, 16384)
"""Of the hidden states: one program, a few, and more than there are partial sums."""
STEPS = 50
WIDTH = 64
SLOTS = 3
BLOCKS = 17


def run_requests(capacity: int, tokens: int) -> None:
    """Call every op as a request of `tokens` tokens does, on several steps."""
    h, encoder = torch.ones(1, tokens, WIDTH).bfloat16(), torch.ones(1, 77, WIDTH).bfloat16()
    ring, encoder_ring = (x.expand(SLOTS, *x.shape).clone() for x in (h, encoder))
    codes, scales = torch.zeros(ring.shape, dtype=torch.uint8), torch.ones(ring.shape[:-1])
    state, fit = LaneState.allocate(capacity, "cpu"), torch.zeros(2, dtype=torch.float64)
    partials = probe_diff(h, h, h)
    stamps = make_stamps(h.device)
    for step in range(STEPS):
        probe_and_decide(h, h, h, state)
        decide(state, None)
        decide(state, partials)
        share_change(partials, partials.clone(), stamps, state, step % 3, step % 20)
        transformation_rate(state, partials, partials)
        fit_recurrence(ring, state, fit)
        predict(h, ring, state.weights, encoder, encoder_ring, state.encoder_weights)
        predict(h, codes, state.weights, scales=scales)
        commit(h, h, h, h, ring, state.counters, encoder, encoder, encoder_ring)
        commit(h, h, h, h, codes, state.counters, scales=scales)


def run_blocks(capacity: int, tokens: int) -> None:
    """Do as `run_requests` with what leaves single blocks out."""
    h = torch.ones(1, tokens, WIDTH).bfloat16()
    rule = [0.1] * bs.NUM_RULE
    state = BlockState.allocate(h, None, [True] * BLOCKS, rule, "triton")
    steps = BlockSteps.allocate(capacity, [True] * BLOCKS, "cpu")
    for step in range(STEPS):
        decide_blocks(block_changes(h, state.inputs, state.residuals, state.stamps), state)
        decide_step(steps, state.decisions)
        decide_tail(steps.lane.counters, state.decisions, steps.flags, steps.store)
        first = step % BLOCKS
        add_residuals(h, state.residuals, first, 1 + step % (BLOCKS - first))
        store_block(state, steps.store, first, h, h)


def run_rows(capacity: int, tokens: int) -> None:
    """Do as `run_requests` with batches of two and three rows."""
    for count in (2, 3):
        h, encoder = torch.ones(count, tokens, WIDTH).bfloat16(), torch.ones(count, 77, WIDTH)
        rows, coded = [], []
        for _ in range(count):
            state, one = LaneState.allocate(capacity, "cpu"), h[:1].clone()
            ring = torch.zeros(SLOTS, 1, tokens, WIDTH).bfloat16()
            rows.append(Row(state, one, ring, torch.zeros(SLOTS, 1, 77, WIDTH)))
            codes = torch.zeros(ring.shape, dtype=torch.uint8)
            coded.append(Row(state, one, codes, None, torch.ones(ring.shape[:-1])))
        rows, coded = Rows(rows), Rows(coded)
        for _ in range(STEPS):
            decide_rows(h, h, rows)
            predict_rows(h, rows, h.clone(), encoder, encoder.clone())
            predict_rows(h, coded, h.clone())
            commit_rows(h, h, h, rows, encoder, encoder)
            commit_rows(h, h, h, coded)


def run_exchange(tokens: int) -> None:
    """Do as `run_requests` with what sequence parallelism calls."""
    x, lse = torch.ones(1, 2 * tokens, 24, 128).bfloat16(), torch.ones(1, 2 * tokens, 24)
    for quantize in (True, False):
        buffer = fp8_pack(x, world=2, scatter="heads", quantize=quantize)
        fp8_unpack(buffer, x.shape, gather="sequence", dtype=x.dtype)
    merge_attention(x, lse, x, lse)


def main() -> None:
    with stubbed_triton() as launches, torch.no_grad():
        for i, tokens in enumerate(TOKENS):
            run_requests(STEPS * 2 + i, tokens)
            run_blocks(STEPS + i, tokens)
            run_rows(STEPS + i, tokens)
            run_exchange(tokens)
    print(json.dumps(launches.variants))


if __name__ == "__main__":
    main()
