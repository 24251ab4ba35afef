"""The ops by row as rows of the kernel benchmark: ROWS lanes per sample of a shape in one launch.

Each row has buffers of its own. No peer decides by sample: beside it runs the peers' sequence for
each row by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench import cache_ops
from bench.cache_ops import cached_lane
from bench.kernel_op import Draw, Inputs, KernelOp, Outputs
from bench.shapes import Shape
from dbcache.kernels.by_row.commit_rows import commit_rows
from dbcache.kernels.by_row.decide_rows import decide_rows
from dbcache.kernels.by_row.predict_rows import predict_rows
from dbcache.kernels.by_row.table import Row, Rows
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.select import Backend

ROWS, ORDER = 4, 1
STREAMS = ("h_in", "h_fn", "h_out", "h", "encoder", "encoder_fn", "encoder_out")
"""What a row has a part of in the tensors of the batch."""


def _by_row(
    make: Callable[[Shape, Draw], Inputs], buffers: tuple[str, ...], *, cached: bool = False
) -> Callable[[Shape, Draw], Inputs]:
    """Return what makes a batch: the inputs of an op for one lane, once for each row.

    Args:
        make: the inputs of the op for one lane.
        buffers: names of what its lane keeps, in the order of a `Row` from P_ref on.
        cached: the lanes have decided to cache.
    """

    def made(shape: Shape, draw: Draw) -> Inputs:
        each = [make(replace(shape, batch=1), draw) for _ in range(ROWS * shape.batch)]
        batch: Inputs = {"each": each}
        for name in STREAMS:
            if each[0].get(name) is not None:
                batch[name] = torch.cat([x[name] for x in each])
                for row, x in enumerate(each):
                    x[name] = batch[name][row : row + 1]
        rows = []
        for x in each:
            state = x.setdefault("state", cached_lane(draw.device, ORDER))
            if cached:
                state.counters[ls.CACHED] = 1
                for weights in (state.weights, state.encoder_weights):
                    weights.copy_(x["h_weights"])
            rows.append(Row(state, *[x.get(name) for name in buffers]))
        return batch | {"rows": Rows(rows), "out": torch.empty_like(_first(batch))}

    return made


def _first(batch: Inputs) -> torch.Tensor:
    return batch["h"] if "h" in batch else batch["h_fn"]


def _decide(x: Inputs, impl: Backend) -> Outputs:
    decide_rows(x["h_in"], x["h_fn"], x["rows"], impl=impl)
    return ()


def _predict(x: Inputs, impl: Backend) -> Outputs:
    encoder = x.get("encoder")
    encoder_out = None if encoder is None else torch.empty_like(encoder)
    predict_rows(x["h"], x["rows"], x["out"], encoder, encoder_out, impl=impl)
    return x["out"].clone(), encoder_out


def _commit(x: Inputs, impl: Backend) -> Outputs:
    streams = (x.get("encoder_fn"), x.get("encoder_out"))
    commit_rows(x["h_in"], x["h_fn"], x["h_out"], x["rows"], *streams, impl=impl)
    return ()


def _of_rows(results: Callable[[Inputs, Outputs], Outputs]) -> Callable[[Inputs, Any], Outputs]:
    """Return the results of all rows: the first of each, then the second of each, and so on."""

    def of(x: Inputs, _: Outputs) -> Outputs:
        return _turned([results(row, ()) for row in x["each"]])

    return of


def _peers(eager: Callable[[Inputs], Outputs]) -> Callable[[Inputs], Outputs]:
    return lambda x: _turned([eager(row) for row in x["each"]])


def _turned(of_rows: list[Outputs]) -> Outputs:
    return tuple(x for parts in zip(*of_rows, strict=True) for x in parts)


def _predict_peers(x: Inputs) -> Outputs:
    streams = zip(*[cache_ops._predict_eager(row) for row in x["each"]], strict=True)
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in streams)


RINGS = ("h_ring", "encoder_ring", "h_scales", "encoder_scales")
ROW_OPS = (
    KernelOp(
        name="decide_rows",
        make=_by_row(cache_ops._make_measured, ("p_ref",)),
        call=_decide,
        eager=_peers(cache_ops._measure_eager),
        results=_of_rows(cache_ops._decision),
        moved=lambda shape: ROWS * cache_ops._probe_bytes(shape),
        eager_waits=True,
    ),
    KernelOp(
        name="predict_rows K=2",
        make=_by_row(cache_ops._make_predict(ORDER), ("no p_ref", *RINGS), cached=True),
        call=_predict,
        eager=_predict_peers,
        moved=lambda shape: ROWS * cache_ops._predict_bytes(ORDER)(shape),
    ),
    KernelOp(
        name="commit_rows K=2",
        make=_by_row(cache_ops._make_commit(ORDER), ("p_ref", *RINGS)),
        call=_commit,
        eager=_peers(cache_ops._commit_eager),
        results=_of_rows(cache_ops._committed),
        moved=lambda shape: ROWS * cache_ops._commit_bytes(shape),
    ),
)
