"""Compare launches that follow a plan with those that go through Triton, as JSON.

Run by test_plans.py in a process of its own, without Triton's interpreter.
"""

import json

import torch

from bench.stubbed_triton import Variant, stubbed_triton
from dbcache.kernels.by_row.commit_rows import LAUNCHES as COMMIT_ROWS_PLANS
from dbcache.kernels.by_row.commit_rows import commit_rows
from dbcache.kernels.by_row.decide_rows import LAUNCHES as DECIDE_ROWS_PLANS
from dbcache.kernels.by_row.decide_rows import decide_rows
from dbcache.kernels.by_row.predict_rows import LAUNCHES as PREDICT_ROWS_PLANS
from dbcache.kernels.by_row.predict_rows import predict_rows
from dbcache.kernels.by_row.table import Row, Rows
from dbcache.kernels.common.lane_state import LaneState
from dbcache.kernels.common.select import forget_plans
from dbcache.kernels.decision.decide import LAUNCHES as DECIDE_PLANS
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.decision.probe_and_decide import LAUNCHES as PROBE_PLANS
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.prediction.commit import LAUNCHES as COMMIT_PLANS
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import LAUNCHES as PREDICT_PLANS
from dbcache.kernels.prediction.predict import predict

ALL = (DECIDE_PLANS, PROBE_PLANS, COMMIT_PLANS, PREDICT_PLANS)
ALL += (DECIDE_ROWS_PLANS, PREDICT_ROWS_PLANS, COMMIT_ROWS_PLANS)
TOKENS, WIDTH, SLOTS = 24, 64, 2


def bf16(*shape):
    return torch.ones(shape, dtype=torch.bfloat16)


def calls():
    """Yield name and call of each form of the ops, on tensors that stay the same."""
    h, h_in, h_out, p_ref = (bf16(1, TOKENS, WIDTH) for _ in range(4))
    encoder, encoder_out = bf16(1, 8, WIDTH), bf16(1, 8, WIDTH)
    ring, encoder_ring = bf16(SLOTS, *h.shape), bf16(SLOTS, *encoder.shape)
    codes, encoder_codes = ring.to(torch.uint8), encoder_ring.to(torch.uint8)
    scales, encoder_scales = torch.ones(ring.shape[:-1]), torch.ones(encoder_ring.shape[:-1])
    state = LaneState.allocate(9, "cpu")
    weights, counters = (state.weights, state.encoder_weights), state.counters
    out, second_out = torch.empty_like(h), torch.empty_like(encoder)
    given = {"out": out, "encoder_out": second_out}
    second = (encoder, encoder_out)
    partials = torch.ones(1, 3, 2)
    yield "decide", lambda: decide(state, None)
    yield "decide measured", lambda: decide(state, partials)
    for by_token in (False, True):
        for start in (h_in, None):
            name = f"probe_and_decide {by_token} {start is None}"
            yield name, lambda s=start, b=by_token: probe_and_decide(s, h, p_ref, state, by_token=b)
    for replace in (False, True):
        yield (
            f"predict {replace}",
            lambda r=replace: predict(h, ring, weights[0], out=out, replace=r),
        )
        yield (
            f"predict encoder {replace}",
            lambda r=replace: predict(
                h, ring, weights[0], encoder, encoder_ring, weights[1], **given, replace=r
            ),
        )
        yield (
            f"predict fp8 {replace}",
            lambda r=replace: predict(
                h, codes, weights[0], encoder, encoder_codes, weights[1], scales, encoder_scales,
                **given, replace=r,
            ),
        )  # fmt: skip
        for start, reference in ((h_in, p_ref), (None, p_ref), (None, None)):
            name = f"{replace} {start is None} {reference is None}"
            args = (start, h, h_out, reference)
            yield (
                f"commit {name}",
                lambda r=replace, a=args: commit(*a, ring, counters, replace=r),
            )
            yield (
                f"commit encoder {name}",
                lambda r=replace, a=args: commit(
                    *a, ring, counters, *second, encoder_ring, replace=r
                ),
            )
            yield (
                f"commit fp8 {name}",
                lambda r=replace, a=args: commit(
                    *a, codes, counters, *second, encoder_codes, scales, encoder_scales, replace=r
                ),
            )
    yield "predict fp8 alone", lambda: predict(h, codes, weights[0], scales=scales, out=out)


def calls_by_row():
    """Yield the same of the ops by row."""
    h, encoder = bf16(2, TOKENS, WIDTH), bf16(2, 8, WIDTH)
    out, encoder_out = torch.empty_like(h), torch.empty_like(encoder)
    rows = []
    for fp8 in (False, True):
        buffers = [bf16(SLOTS, 1, *x.shape[1:]) for x in (h, encoder)]
        scales = [torch.ones(x.shape[:-1]) if fp8 else None for x in buffers]
        buffers = [x.to(torch.uint8) if fp8 else x for x in buffers]
        lanes = [Row(LaneState.allocate(9, "cpu"), bf16(1, TOKENS, WIDTH), *buffers, *scales)] * 2
        rows.append(Rows(lanes))
    for measures in (True, False):
        yield f"decide_rows {measures}", lambda m=measures: decide_rows(h, h, rows[0], measures=m)
    for lanes in rows:
        name = f"rows {lanes.first.scales is not None}"
        for second in ((), (encoder, encoder_out)):
            yield (
                f"predict_{name} {len(second)}",
                lambda r=lanes, s=second: predict_rows(h, r, out, *s),
            )
            yield (
                f"commit_{name} {len(second)}",
                lambda r=lanes, s=second: commit_rows(h, h, h, r, *s),
            )


def main() -> None:
    launches = []
    Variant.run = lambda self, *args: launches.append(args)
    own_like = torch.empty_like

    rows = []
    with stubbed_triton(counted=False), torch.no_grad():
        forms = [*calls(), *calls_by_row()]  # plans end with the tensors that these hold
        for name, call in forms:
            call()
            first = launches.pop()
            torch.empty_like = lambda x, **options: x  # the partial sums of the first launch
            call()
            torch.empty_like = own_like
            again = launches.pop()
            through = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in first]
            # grid, stream, function and metadata; then what Triton hands to hooks; then arguments
            same = through[:6] == list(again[:6]) and through[9:] == list(again[9:])
            ints = not any(isinstance(x, torch.Tensor) for x in again)
            rows.append({"name": name, "same": same, "direct": ints})
        before = sum(map(len, ALL))
        forget_plans()
        after = sum(map(len, ALL))
    print(json.dumps({"rows": rows, "before": before, "after": after, "rest": others()}))


def others() -> dict[str, bool]:
    """Return what happens with tensors that a plan was not made for."""
    launches: list[tuple] = []
    Variant.run = lambda self, *args: launches.append(args)
    found = {}
    with stubbed_triton(counted=False), torch.no_grad():
        h, ring, state = (
            bf16(1, TOKENS, WIDTH),
            bf16(1, 1, TOKENS, WIDTH),
            LaneState.allocate(9, "cpu"),
        )
        predict(h, ring, state.weights)
        odd = bf16(h.numel() + 1)[1:].view(h.shape)
        predict(odd, ring, state.weights)
        found["unaligned"] = isinstance(launches[-1][9 + 2], torch.Tensor)
        transposed = bf16(1, WIDTH, TOKENS).mT
        predict(transposed, ring, state.weights)
        predict(transposed, ring, state.weights)  # launched on a copy, so there is no plan
        found["transposed"] = isinstance(launches[-1][9 + 2], torch.Tensor)
        try:
            predict(h, ring, state.weights.double())
        except ValueError as error:
            found["checked"] = "must be float32" in str(error)
        predict(h, ring, state.weights)
        other = ring.clone()  # of another lane
        predict(h, other, state.weights)
        found["another ring"] = isinstance(launches[-1][9 + 2], torch.Tensor)
        plans = len(PREDICT_PLANS)
        del other
        launches.clear()
        found["gone"] = len(PREDICT_PLANS) == plans - 1
        probe_and_decide(h, h, h, state)
        state.grow(20)
        for _ in range(2):
            probe_and_decide(h, h, h, state)
        addresses = [*state.addresses(), 20, state.partials.data_ptr()]
        found["grown"] = list(launches[-1][9 + 3 : 9 + 12]) == addresses
        sums = state.partials
        wide = h.repeat(9, 1, 1)
        for _ in range(2):
            probe_and_decide(wide, wide, wide, state)
        probe_and_decide(h, h, h, state)
        # a graph that was captured before goes on to write there
        found["outgrown"] = state.partials is not sums and any(x is sums for x in state._outgrown)
    return found


if __name__ == "__main__":
    main()
