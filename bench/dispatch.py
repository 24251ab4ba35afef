"""Host time of each op on a GPU, measured without one: Triton's path with the launch left out.

python -m bench.dispatch [--rounds N] [--json FILE]

Checks, the choice of a grid, outputs and the look-up of the compiled kernel are all there, as
`bench.stubbed_triton` lets kernels be dispatched on CPU tensors; only the launch does nothing.
Beside it are the PyTorch operations that cache-dit (1.5.3) calls for the same purpose, on CPU
tensors of 64 elements, which are dispatched and compute next to nothing; its wait for the result is
left out.

All rows are timed in turns, a few calls at a time, and the fastest turn counts. A small `torch.add`
is one of the rows and the unit of the others, so that figures of different machines can be
compared.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.stubbed_triton import stubbed_triton
from dbcache.kernels.by_row.commit_rows import commit_rows
from dbcache.kernels.by_row.decide_rows import decide_rows
from dbcache.kernels.by_row.predict_rows import predict_rows
from dbcache.kernels.by_row.table import Row, Rows
from dbcache.kernels.common.lane_state import LaneState
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import predict
from dbcache.kernels.pruning.add_residuals import add_residuals

Call = Callable[[], object]

CALLS = 20
"""Calls per turn: so few that a turn is seldom interrupted."""
SHAPE, ENCODER_SHAPE = (1, 4096, 64), (1, 512, 64)
ROWS = 8
"""Of a batch whose samples decide for themselves."""


def rows() -> dict[str, tuple[Call, Call | None]]:
    """Return by name: a call of an op, and what cache-dit does in its place."""
    h, encoder = (torch.ones(shape, dtype=torch.bfloat16) for shape in (SHAPE, ENCODER_SHAPE))
    ring, encoder_ring = h[None].clone(), encoder[None].clone()
    residuals = torch.ones(3, *SHAPE, dtype=torch.bfloat16)
    state = LaneState.allocate(50, "cpu")
    out = torch.empty_like(h)
    weights, encoder_weights, counters = state.weights, state.encoder_weights, state.counters
    small = torch.ones(8)
    x, y, e = (torch.ones(64) for _ in range(3))

    def similar() -> torch.Tensor:
        residual = x - y
        return (y - residual).abs().mean() / y.abs().mean()

    return {
        "torch.add": (lambda: torch.add(small, small), None),
        "probe_and_decide": (lambda: probe_and_decide(h, h, h, state), similar),
        "decide": (lambda: decide(state, None), None),
        "predict": (lambda: predict(h, ring, weights), lambda: x + y),
        "predict, out given": (lambda: predict(h, ring, weights, out=out), lambda: x + y),
        "predict, two streams": (
            lambda: predict(h, ring, weights, encoder, encoder_ring, encoder_weights),
            lambda: (x + y, e + e),
        ),
        "commit": (lambda: commit(h, h, h, h, ring, counters), lambda: (x - y, x - y)),
        "commit, two streams": (
            lambda: commit(h, h, h, h, ring, counters, encoder, encoder, encoder_ring),
            lambda: (x - y, x - y, e - e),
        ),
        "add_residuals": (lambda: add_residuals(h, residuals, 0, 3), lambda: x + y + y + y),
    } | _by_row()


def _by_row() -> dict[str, tuple[Call, Call | None]]:
    """Return the ops by row, each for `ROWS` lanes; no peer decides by sample."""
    batch = torch.ones(ROWS, *SHAPE[1:], dtype=torch.bfloat16)
    out, known = torch.empty_like(batch), {}
    lanes = [
        Row(LaneState.allocate(50, "cpu"), batch[:1].clone(), batch[:1][None].clone())
        for _ in range(ROWS)
    ]
    rows = Rows(lanes, known)
    return {
        f"table of {ROWS} rows": (lambda: Rows(lanes, known), None),
        f"decide_rows, {ROWS} rows": (lambda: decide_rows(batch, batch, rows), None),
        f"predict_rows, {ROWS} rows": (lambda: predict_rows(batch, rows, out), None),
        f"commit_rows, {ROWS} rows": (lambda: commit_rows(batch, batch, batch, rows), None),
    }


def measure(rounds: int) -> dict[str, list[float | None]]:
    """Return by name: microseconds of the op, of cache-dit's operations or None."""
    with stubbed_triton(counted=False), torch.no_grad():
        calls = rows()
        best: dict[tuple[str, int], float] = {}
        for _ in range(rounds):
            for name, both in calls.items():
                for side, call in enumerate(both):
                    if call is not None:
                        spent = turn(call)
                        best[name, side] = min(spent, best.get((name, side), spent))
    return {name: [best.get((name, side)) for side in (0, 1)] for name in calls}


def turn(call: Call) -> float:
    """Return the microseconds of one of `CALLS` calls."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="turns of each row (300)")
    parser.add_argument("--json", type=Path, help="write the figures to a file, too")
    arguments = parser.parse_args()
    figures = measure(arguments.rounds)
    unit = figures["torch.add"][0]
    assert unit is not None
    print(f"{'op':22} {'us':>7} {'adds':>6}   {'cache-dit us':>12} {'adds':>6}")
    for name, (own, peer) in figures.items():
        assert own is not None
        peers = "" if peer is None else f"{peer:12.2f} {peer / unit:6.1f}"
        print(f"{name:22} {own:7.2f} {own / unit:6.1f}   {peers}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
