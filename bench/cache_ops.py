"""The cache's own ops as rows of the kernel benchmark, with the PyTorch that the peers run.

The peers' sequences are written from their published formulas, in the model's dtype: the relative
L1 of the first-block cache (ParaAttention, cache-dit) and TaylorSeer's finite differences
(arXiv:2503.06923) with one gap per update. Where the formula leaves a choice, the cheaper form is
taken: no multiplication by the coefficient 1, no addition to 0. None of them has fp8 residuals, so
the fp8 rows are compared with the same sequence in the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from bench.kernel_op import Draw, Inputs, KernelOp, Outputs
from bench.shapes import Shape
from dbcache.kernels.common import e4m3
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState
from dbcache.kernels.common.select import Backend
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.decision.share_change import make_stamps, share_change
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import predict

GAP = 2
"""Steps between the snapshots, and from the latest one to the step that is predicted."""
CAPACITY = 2**16
"""Steps that a lane has room for: more than there are calls."""
THRESHOLD = 0.999
"""Everything below is similar, and still measured."""


# -- measuring and deciding


def _make_probe(shape: Shape, draw: Draw) -> Inputs:
    h_in = draw.hidden(shape)
    h_fn = h_in + draw.hidden(shape, 0.5)
    p_ref = h_fn - h_in
    p_ref += draw.hidden(shape, 0.05)
    return {"h_in": h_in, "h_fn": h_fn, "p_ref": p_ref}


def _probe(x: Inputs, impl: Backend) -> Outputs:
    return (probe_diff(x["h_in"], x["h_fn"], x["p_ref"], impl=impl),)


def _ratio(_: Inputs, outputs: Outputs) -> Outputs:
    (partials,) = outputs
    assert isinstance(partials, torch.Tensor)
    sums = partials.sum((0, 1))
    return (sums[0] / sums[1],)


def _relative_l1(x: Inputs) -> torch.Tensor:
    residual = x["h_fn"] - x["h_in"]
    return (x["p_ref"] - residual).abs().mean() / x["p_ref"].abs().mean()


def _probe_eager(x: Inputs) -> Outputs:
    return (_relative_l1(x),)


def cached_lane(device: torch.device, order: int = 1) -> LaneState:
    """Return a lane after full steps 0 and GAP that caches every further step."""
    state = LaneState.allocate(CAPACITY, device)
    state.limits[ls.SLOTS] = order + 1
    state.limits[ls.ORDER] = state.limits[ls.ENCODER_ORDER] = order
    state.thresholds[ls.THRESHOLD] = THRESHOLD
    counters = [0] * ls.NUM_COUNTERS
    counters[ls.STEP] = (order + 1) * GAP
    counters[ls.REFERENCE], counters[ls.SNAPSHOTS] = 1, order + 1
    for slot in range(order + 1):
        counters[ls.RING_STEPS + slot] = slot * GAP
    state.counters.copy_(torch.tensor(counters, dtype=torch.int32))
    return state


def _make_measured(shape: Shape, draw: Draw) -> Inputs:
    return _make_probe(shape, draw) | {"state": cached_lane(draw.device)}


def _make_decide(shape: Shape, draw: Draw) -> Inputs:
    # only the size of the partial sums follows from the shape
    x = _make_probe(shape, draw)
    impl: Backend = "triton" if draw.device.type == "cuda" else "reference"
    partials = probe_diff(x["h_in"], x["h_fn"], x["p_ref"], impl=impl)
    return {"partials": partials, "state": cached_lane(draw.device)}


def _decision(x: Inputs, _: Outputs) -> Outputs:
    """Return whether the latest step was cached, its change, and its weights."""
    state = x["state"]
    return (
        state.counters[ls.CACHED].float(),
        state.values[ls.DIFF].clone(),
        state.values[ls.WEIGHTS :].clone(),
    )


def _decide(x: Inputs, impl: Backend) -> Outputs:
    decide(x["state"], x["partials"], impl=impl)
    return ()


def _decide_eager(x: Inputs) -> Outputs:
    sums = x["partials"].sum((0, 1))
    return ((sums[0] / sums[1]).item() < THRESHOLD,)


def _make_shared(shape: Shape, draw: Draw) -> Inputs:
    """Return what branch 0 has measured on the step that branch 1 begins."""
    x = _make_decide(shape, draw)
    stamps = make_stamps(draw.device)
    stamps[:, 0], stamps[:, 1], stamps[:, 2] = 0, x["state"].counters[ls.STEP], 0
    kept = draw.normal(*x["partials"].shape, dtype=torch.float32)
    return x | {"stamps": stamps, "kept": kept}


def _share(x: Inputs, impl: Backend) -> Outputs:
    share_change(x["partials"], x["kept"], x["stamps"], x["state"], 1, 0, impl=impl)
    return (x["partials"].clone(),)


def _share_eager(x: Inputs) -> Outputs:
    branch, step, kind = x["stamps"][0]
    is_taken = (branch != 1) & (step == x["state"].counters[ls.STEP]) & (kind == 0)
    return (torch.where(is_taken, x["kept"], x["partials"]),)


def _measure(x: Inputs, impl: Backend) -> Outputs:
    partials = probe_diff(x["h_in"], x["h_fn"], x["p_ref"], impl=impl)
    decide(x["state"], partials, impl=impl)
    return ()


def _measure_eager(x: Inputs) -> Outputs:
    return (_relative_l1(x).item() < THRESHOLD,)


def _probe_and_decide(x: Inputs, impl: Backend) -> Outputs:
    probe_and_decide(x["h_in"], x["h_fn"], x["p_ref"], x["state"], impl=impl)
    return ()


def _make_tokens(shape: Shape, draw: Draw) -> Inputs:
    x = _make_probe(shape, draw)
    # the middle token changed by this much: half of them are important
    change = (x["h_fn"] - x["h_in"] - x["p_ref"]).float().abs().mean(-1)
    change /= x["p_ref"].float().abs().mean(-1)
    x["thresholds"] = torch.zeros(ls.NUM_THRESHOLDS, device=draw.device)
    x["thresholds"][ls.IMPORTANT] = x["important"] = change.median().item()
    return x


def _probe_tokens(x: Inputs, impl: Backend) -> Outputs:
    return (probe_diff(x["h_in"], x["h_fn"], x["p_ref"], x["thresholds"], impl=impl),)


def _ratio_of_important(_: Inputs, outputs: Outputs) -> Outputs:
    (partials,) = outputs
    assert isinstance(partials, torch.Tensor)
    sums = partials.sum((0, 1))
    return (sums[2] / sums[3],)


def _probe_tokens_eager(x: Inputs) -> Outputs:
    change = (x["p_ref"] - (x["h_fn"] - x["h_in"])).abs()
    base = x["p_ref"].abs()
    important = change.mean(-1) / base.mean(-1) > x["important"]
    if important.sum() > 0:
        change, base = change[important], base[important]
    return (change.mean() / base.mean(),)


def _make_block_input(shape: Shape, draw: Draw) -> Inputs:
    h_fn = draw.hidden(shape)
    return {"h_fn": h_fn, "p_ref": h_fn + draw.hidden(shape, 0.05)}


def _probe_block_input(x: Inputs, impl: Backend) -> Outputs:
    return (probe_diff(None, x["h_fn"], x["p_ref"], impl=impl),)


def _probe_block_input_eager(x: Inputs) -> Outputs:
    return ((x["p_ref"] - x["h_fn"]).abs().mean() / x["p_ref"].abs().mean(),)


def _probe_bytes(shape: Shape) -> int:
    # h_in, h_fn and p_ref of the hidden states; the encoder states are not looked at
    return 3 * shape.hidden_bytes


# -- predicting

STREAM = ("ring", "weights", "differences", "scales", "fn", "out")
"""What comes with a stream, and is None where a model has no encoder stream."""


def _make_predict(order: int, fp8: bool = False) -> Callable[[Shape, Draw], Inputs]:
    """Return what makes order + 1 snapshots, newest first, and the differences that peers keep."""

    def make(shape: Shape, draw: Draw) -> Inputs:
        x: Inputs = {}
        values = ls.LaneState.allocate(1, draw.device).values
        weights = _taylor_weights(order)
        values[ls.WEIGHTS : ls.WEIGHTS + len(weights)] = torch.tensor(weights, device=draw.device)
        for name, stream in (("h", draw.hidden), ("encoder", draw.encoder)):
            x[name] = stream(shape)
            if x[name] is None:
                x |= dict.fromkeys(f"{name}_{what}" for what in STREAM)
                continue
            # residuals change slowly: each snapshot is the one before it and a little more
            newest = stream(shape)
            assert newest is not None
            snapshots = [newest]
            for _ in range(order):
                change = stream(shape, 0.1)
                assert change is not None
                snapshots.append(snapshots[-1] + change)
            ring, scales = torch.stack(snapshots), None
            if fp8:
                parts = [e4m3.quantize(x.float()) for x in snapshots]
                ring, scales = (torch.stack(part) for part in zip(*parts, strict=True))
            x[f"{name}_ring"], x[f"{name}_scales"] = ring, scales
            x[f"{name}_weights"] = values[ls.WEIGHTS : ls.WEIGHTS + ls.MAX_SLOTS]
            x[f"{name}_differences"] = _differences(snapshots)
        return x

    return make


def _taylor_weights(order: int) -> list[float]:
    """Return the weights of snapshots GAP steps apart, newest first: the differences expanded."""
    weights = [0.0] * (order + 1)
    for i in range(order + 1):
        for m in range(i + 1):
            # D(i) = sum over m of (-1)^m binomial(i, m) Y_m / gap^i, with k = gap
            weights[m] += (-1) ** m * math.comb(i, m) / math.factorial(i)
    return weights


def _differences(snapshots: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the backward differences of order 0, 1, ... at the newest snapshot."""
    found, row = [snapshots[0]], [x.float() for x in snapshots]
    while len(row) > 1:
        row = [(new - old) / GAP for new, old in pairwise(row)]
        found.append(row[0].to(snapshots[0].dtype))
    return found


def _predict(x: Inputs, impl: Backend) -> Outputs:
    return predict(
        x["h"], x["h_ring"], x["h_weights"],
        x["encoder"], x["encoder_ring"], x["encoder_weights"],
        x["h_scales"], x["encoder_scales"], impl=impl,
    )  # fmt: skip


def _predict_eager(x: Inputs) -> Outputs:
    out: list[torch.Tensor | None] = []
    for name in ("h", "encoder"):
        if x[name] is None:
            out.append(None)
            continue
        residual = x[f"{name}_differences"][0]
        for i, difference in enumerate(x[f"{name}_differences"][1:], start=1):
            residual = residual + difference * (GAP**i / math.factorial(i))
        out.append((x[name] + residual).contiguous())
    return tuple(out)


def _predict_bytes(order: int, fp8: bool = False) -> Callable[[Shape], int]:
    def moved(shape: Shape) -> int:
        stream = shape.hidden_bytes + shape.encoder_bytes
        snapshot = _fp8_bytes(shape) if fp8 else stream
        # h, order + 1 snapshots and the output, of both streams
        return 2 * stream + (order + 1) * snapshot

    return moved


def _fp8_bytes(shape: Shape) -> int:
    """Bytes of one snapshot of both streams in fp8: a byte per element, a scale per token."""
    return shape.batch * (shape.hidden + shape.encoder) * (shape.width + 4)


# -- committing


def _make_commit(order: int, fp8: bool = False) -> Callable[[Shape, Draw], Inputs]:
    """Return what makes a full step's activations, the ring, and the differences so far."""

    def make(shape: Shape, draw: Draw) -> Inputs:
        state = cached_lane(draw.device, order)
        x: Inputs = {"h_in": draw.hidden(shape), "counters": state.counters}
        for name, stream in (("h", draw.hidden), ("encoder", draw.encoder)):
            x |= dict.fromkeys(f"{name}_{what}" for what in STREAM)
            fn = stream(shape)
            if fn is None:
                continue
            x[f"{name}_fn"], x[f"{name}_out"] = fn, stream(shape)
            # what commit must write holds NaN until it has
            size = (order + 1, *fn.shape)
            if fp8:
                x[f"{name}_ring"] = fn.new_full(size, 0x7F, dtype=torch.uint8)
                x[f"{name}_scales"] = fn.new_full(size[:-1], math.nan, dtype=torch.float32)
            else:
                x[f"{name}_ring"] = fn.new_full(size, math.nan)
            x[f"{name}_differences"] = [stream(shape) for _ in range(order)]
        x["p_ref"] = torch.full_like(x["h_in"], math.nan)
        return x

    return make


def _commit(x: Inputs, impl: Backend) -> Outputs:
    commit(
        x["h_in"], x["h_fn"], x["h_out"], x["p_ref"], x["h_ring"], x["counters"],
        x["encoder_fn"], x["encoder_out"], x["encoder_ring"],
        x["h_scales"], x["encoder_scales"], impl=impl,
    )  # fmt: skip
    return ()


def _committed(x: Inputs, _: Outputs) -> Outputs:
    """Return the probe residual and the slot of each stream, as numbers."""
    stored: list[torch.Tensor | None] = [x["p_ref"]]
    for name in ("h", "encoder"):
        ring, scales = x[f"{name}_ring"], x[f"{name}_scales"]
        if ring is None:
            stored.append(None)
        else:
            stored.append(ring[0] if scales is None else e4m3.dequantize(ring[0], scales[0]))
    return tuple(stored)


def _commit_eager(x: Inputs) -> Outputs:
    new: list[list[torch.Tensor] | None] = []
    for name in ("h", "encoder"):
        if x[f"{name}_fn"] is None:
            new.append(None)
            continue
        differences = [x[f"{name}_out"] - x[f"{name}_fn"]]
        for old in x[f"{name}_differences"]:
            differences.append((differences[-1] - old) / GAP)
        new.append(differences)
    h, encoder = new
    assert h is not None
    # all are new tensors that the peers keep; the first difference is the snapshot
    return (
        x["h_fn"] - x["h_in"],
        h[0],
        None if encoder is None else encoder[0],
        *h[1:],
        *(encoder or [])[1:],
    )


def _commit_bytes(shape: Shape) -> int:
    # read h_in, h_fn, h_out, write p_ref and a slot; of the encoder states read two, write a slot
    return 5 * shape.hidden_bytes + 3 * shape.encoder_bytes


def _commit_fp8_bytes(shape: Shape) -> int:
    # the same but for the slots
    return 4 * shape.hidden_bytes + 2 * shape.encoder_bytes + _fp8_bytes(shape)


CACHE_OPS = (
    KernelOp(
        name="probe_diff",
        make=_make_probe,
        call=_probe,
        eager=_probe_eager,
        results=_ratio,
        moved=_probe_bytes,
        tuned=("probe_diff", 1),
    ),
    KernelOp(
        name="decide",
        make=_make_decide,
        call=_decide,
        eager=_decide_eager,
        results=_decision,
        moved=None,
        eager_waits=True,
    ),
    KernelOp(
        name="share_change",
        make=_make_shared,
        call=_share,
        eager=_share_eager,
        moved=None,
    ),
    KernelOp(
        name="probe_diff+decide",
        make=_make_measured,
        call=_measure,
        eager=_measure_eager,
        results=_decision,
        moved=_probe_bytes,
        tuned=("probe_diff", 1),
        eager_waits=True,
    ),
    *(
        KernelOp(
            name=f"predict K={order + 1}",
            make=_make_predict(order),
            call=_predict,
            eager=_predict_eager,
            moved=_predict_bytes(order),
            tuned=("predict", order + 1),
        )
        for order in range(3)
    ),
    *(
        KernelOp(
            name=f"commit K={order + 1}",
            make=_make_commit(order),
            call=_commit,
            eager=_commit_eager,
            results=_committed,
            moved=_commit_bytes,
            tuned=("commit", 1),
        )
        for order in range(3)
    ),
    *(
        KernelOp(
            name=f"predict fp8 K={order + 1}",
            make=_make_predict(order, fp8=True),
            call=_predict,
            eager=_predict_eager,
            eager_tolerance=0.2,
            moved=_predict_bytes(order, fp8=True),
        )
        for order in range(2)
    ),
    KernelOp(
        name="commit fp8",
        make=_make_commit(0, fp8=True),
        call=_commit,
        eager=_commit_eager,
        results=_committed,
        moved=_commit_fp8_bytes,
    ),
    KernelOp(
        name="probe_and_decide",
        make=_make_measured,
        call=_probe_and_decide,
        eager=_measure_eager,
        results=_decision,
        moved=_probe_bytes,
        tuned=("probe_and_decide", 1),
        eager_waits=True,
    ),
    KernelOp(
        name="probe_diff tokens",
        make=_make_tokens,
        call=_probe_tokens,
        eager=_probe_tokens_eager,
        results=_ratio_of_important,
        moved=_probe_bytes,
        tuned=("probe_diff tokens", 1),
        eager_waits=True,
    ),
    KernelOp(
        name="probe_diff block",
        make=_make_block_input,
        call=_probe_block_input,
        eager=_probe_block_input_eager,
        results=_ratio,
        # the block's input now and at its last computed step
        moved=lambda shape: 2 * shape.hidden_bytes,
        tuned=("probe_diff", 1),
    ),
)
