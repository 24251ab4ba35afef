"""Count the variants of each kernel that eleven resolutions and fifty steps would compile, as JSON.

Beside the counts it says what `compile_offline*.py` compile otherwise than it is launched. Run by
test_variants.py in a process of its own, without Triton's interpreter.
"""

import json
from itertools import chain

import compile_offline
import compile_offline_parallel
import compile_offline_rows
import torch
from triton.runtime.jit import JITFunction

from bench.stubbed_triton import stubbed_triton
from dbcache.kernels.by_row.commit_rows import commit_rows
from dbcache.kernels.by_row.decide_rows import decide_rows
from dbcache.kernels.by_row.predict_rows import predict_rows
from dbcache.kernels.by_row.table import Row, Rows
from dbcache.kernels.common import sums
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
from dbcache.kernels.prediction.scheduled_weights import scheduled_weights
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.add_residuals import add_residuals
from dbcache.kernels.pruning.block_changes import block_changes
from dbcache.kernels.pruning.block_state import BlockState, BlockSteps
from dbcache.kernels.pruning.decide_blocks import decide_blocks
from dbcache.kernels.pruning.decide_step import decide_step
from dbcache.kernels.pruning.decide_tail import decide_tail
from dbcache.kernels.pruning.store_block import store_block

TOKENS = (1, 16, 17, 80, 256, 1000, 1024, 1025, 4608, 16384)
"""Of the hidden states; Triton has variants for numbers that are 1 and for multiples of 16."""
SPREAD = {4640: 16, 16416: 33}
"""With at most so many programs at these other sizes, each takes several blocks: 10, and 16."""
BATCHES = (1, 2, 16)
STEPS = 50
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True, "maxnreg": None}
"""What is compared of a launch, and Triton's defaults."""
WIDTH = 64
SLOTS = 3
BLOCKS = 33


def streams(tokens: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden and encoder states."""
    x = torch.empty(batch, tokens, WIDTH, dtype=torch.bfloat16)
    return x, torch.empty_like(x)


def ring_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a ring for `x`, one of fp8 codes, and its scales."""
    shape = SLOTS, *x.shape
    return x.new_empty(shape), torch.empty(shape, dtype=torch.uint8), torch.empty(shape[:-1])


def run_requests(capacity: int, tokens: int, batch: int) -> None:
    """Call every op as a request of `tokens` tokens does, on several steps."""
    h, encoder = streams(tokens, batch)
    ring, codes, scales = ring_of(h)
    second, second_codes, second_scales = ring_of(encoder)
    state, fit = LaneState.allocate(capacity, "cpu"), torch.zeros(2, dtype=torch.float64)
    table = torch.zeros(capacity, 16)
    partials = probe_diff(h, h, h)
    stamps = make_stamps(h.device)
    for step in range(STEPS):
        probe_diff(h, h, h, state.thresholds)
        for by_token in (False, True):
            probe_and_decide(h, h, h, state, by_token=by_token)
        decide(state, None)
        decide(state, partials)
        share_change(partials, partials.clone(), stamps, state, step % 3, step % 20)
        transformation_rate(state, partials, partials)
        fit_recurrence(ring[: 1 + step % SLOTS], state, fit)
        scheduled_weights(state, table)
        weights = state.weights, state.encoder_weights
        predict(h, ring, weights[0], encoder, second, weights[1])
        predict(h, codes, weights[0], encoder, second_codes, weights[1], scales, second_scales)
        commit(h, h, h, h, ring, state.counters, encoder, encoder, second)
        both = encoder, encoder, second_codes, scales, second_scales
        commit(h, h, h, h, codes, state.counters, *both)


def run_blocks(capacity: int, tokens: int, batch: int) -> None:
    """Do as `run_requests` with what leaves single blocks out, of models of several depths."""
    h = streams(tokens, batch)[0]
    blocks = BLOCKS - batch  # 32, 31 and 17
    rule = [0.1] * bs.NUM_RULE
    state = BlockState.allocate(h, None, [True] * blocks, rule, "triton")
    steps = BlockSteps.allocate(capacity, [True] * blocks, "cpu")
    for step in range(STEPS):
        decide_blocks(block_changes(h, state.inputs, state.residuals, state.stamps), state)
        decide_step(steps, state.decisions)
        decide_tail(steps.counters, state.decisions, steps.flags, steps.store)
        first = step % blocks
        add_residuals(h, state.residuals, first, 1 + step % (blocks - first))
        store_block(state, steps.store, first, h, h)


def run_rows(capacity: int, tokens: int) -> None:
    """Do as `run_requests` with batches of two and three rows."""
    for count in (2, 3):
        h, encoder = streams(tokens, count)
        rows, coded = [], []
        for _ in range(count):
            state, one = LaneState.allocate(capacity, "cpu"), h[:1].clone()
            ring, codes, scales = ring_of(one)
            second, second_codes, second_scales = ring_of(encoder[:1])
            rows.append(Row(state, one, ring, second))
            coded.append(Row(state, one, codes, second_codes, scales, second_scales))
        rows, coded = Rows(rows), Rows(coded)
        for _ in range(STEPS):
            decide_rows(None, h, rows, measures=False)
            for by_token in (False, True):
                decide_rows(h, h, rows, by_token=by_token)
            for kind in (rows, coded):
                predict_rows(h, kind, h.clone(), encoder, encoder.clone())
                commit_rows(h, h, h, kind, encoder, encoder)


def run_exchange(tokens: int) -> None:
    """Do as `run_requests` with what sequence parallelism calls, of models of several heads."""
    for heads in (24, 32):
        x = torch.empty(1, 2 * tokens, heads, 128).bfloat16()
        for quantize in (True, False):
            buffer = fp8_pack(x, world=2, scatter="heads", quantize=quantize)
            fp8_unpack(buffer, x.shape, gather="sequence", dtype=x.dtype)
        own = x[:, :tokens]  # as it lies beside the heads, and as attention kernels leave it
        for lse in (own[..., 0].float(), torch.empty(1, heads, tokens).transpose(1, 2)):
            merge_attention(own, lse, own, lse)


def pointers(arguments: dict[str, str]) -> dict[str, str]:
    """Return the types of the pointers that are given."""
    return {name: kind for name, kind in sorted(arguments.items()) if kind.startswith("*")}


class Compared:
    """What was launched beside what is compiled offline.

    Attributes:
        wrong: what differs, in words.
    """

    def __init__(self) -> None:
        self.wrong: set[str] = set()
        self._offline: dict[str, list] = {}
        scripts = (compile_offline, compile_offline_parallel, compile_offline_rows)
        variants = chain.from_iterable(script.variants() for script in scripts)
        for _, kernel, arguments, _, options in compile_offline.with_configs(variants):
            hints = compile_offline.divisible(kernel, arguments)
            known = *(options.get(*option) for option in OPTIONS.items()), pointers(arguments)
            self._offline.setdefault(kernel.__name__, []).append((known, hints))

    def compare(self, kernel, signature, options, attrs) -> None:
        """Take a variant that is about to be compiled; numbers here are multiples of 16."""
        name = kernel.__name__
        known = *(getattr(options, name) for name in OPTIONS), pointers(signature)
        hints = [hints for other, hints in self._offline[name] if other == known]
        if not hints:
            self.wrong.add(f"{name}: {(*OPTIONS, 'pointers')} = {known}")
        given = {arg for arg, kind in signature.items() if kind != "constexpr"}
        found = {kernel.arg_names[at[0]] for at in attrs}
        for arg in set().union(*hints) & given - found:
            self.wrong.add(f"{name}: {arg} is not said to be divisible by 16")


def main() -> None:
    compared = Compared()
    with stubbed_triton() as launches, torch.no_grad():
        stubbed = JITFunction._do_compile

        def compiled(kernel, key, signature, device, constexprs, options, attrs, *rest):
            compared.compare(kernel, signature, options, attrs)
            return stubbed(kernel, key, signature, device, constexprs, options, attrs, *rest)

        JITFunction._do_compile = compiled
        most = sums.MAX_PARTIALS
        for i, tokens in enumerate((*TOKENS, *SPREAD)):
            sums.MAX_PARTIALS = SPREAD[tokens] if i >= len(TOKENS) else most
            capacity, batch = 16 * 4 + i, BATCHES[i % len(BATCHES)]
            run_requests(capacity, tokens, batch)
            run_blocks(capacity, tokens, batch)
            run_rows(capacity, tokens)
            run_exchange(tokens)
    print(json.dumps({"variants": launches.variants, "wrong": sorted(compared.wrong)}))


if __name__ == "__main__":
    main()
