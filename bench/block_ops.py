"""The ops that leave out single blocks as rows of the kernel benchmark, beside PyTorch's sequence.

The peer's sequence is DBPrune's as cache-dit runs it: one relative L1 per block, an addition per
block that is left out.
"""

from __future__ import annotations

import torch

from bench.cache_ops import CAPACITY
from bench.kernel_op import Draw, Inputs, KernelOp, Outputs
from bench.shapes import Shape
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.select import Backend
from dbcache.kernels.common.sums import partition_of
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.add_residuals import add_residuals
from dbcache.kernels.pruning.block_changes import block_changes
from dbcache.kernels.pruning.block_state import BlockState, BlockSteps
from dbcache.kernels.pruning.decide_blocks import decide_blocks
from dbcache.kernels.pruning.decide_step import decide_step
from dbcache.kernels.pruning.decide_tail import decide_tail
from dbcache.kernels.pruning.store_block import store_block

BLOCKS = 4
"""Blocks of the run; the time is proportional to it."""
THRESHOLD = 0.12


def _make(shape: Shape, draw: Draw) -> Inputs:
    h, encoder = draw.hidden(shape), draw.encoder(shape)
    rule = [0.0] * bs.NUM_RULE
    rule[bs.THRESHOLD] = THRESHOLD
    state = BlockState.allocate(h, encoder, [True] * BLOCKS, rule)
    parts = partition_of(h.numel())[1]  # whichever implementation runs
    state.growth_sums = torch.ones(BLOCKS, parts, 2, device=draw.device)
    x = h + draw.hidden(shape, 0.1)
    for block in range(BLOCKS):
        added = draw.hidden(shape, 0.5)
        state.inputs[block], state.residuals[block] = x, added
        x = x + added
        if state.encoder_residuals is not None:
            state.encoder_residuals[block] = draw.encoder(shape, 0.5)
    return {"h": h, "encoder": encoder, "state": state}


def _changes(x: Inputs, impl: Backend) -> Outputs:
    state = x["state"]
    return (block_changes(x["h"], state.inputs, state.residuals, state.stamps, impl=impl),)


def _ratios(_: Inputs, outputs: Outputs) -> Outputs:
    (partials,) = outputs
    assert isinstance(partials, torch.Tensor)
    sums = partials.sum((1, 2))
    return (sums[:, 0] / sums[:, 1],)


def _relative_l1(x: Inputs) -> torch.Tensor:
    h, state, ratios = x["h"], x["state"], []
    for block in range(BLOCKS):
        before = state.inputs[block]
        ratios.append((before - h).abs().mean() / before.abs().mean())
        h = h + state.residuals[block]
    return torch.stack(ratios)


def _changes_eager(x: Inputs) -> Outputs:
    return (_relative_l1(x),)


def _make_measured(shape: Shape, draw: Draw) -> Inputs:
    x = _make(shape, draw)
    impl: Backend = "triton" if draw.device.type == "cuda" else "reference"
    return x | {"partials": _changes(x, impl)[0]}


def _decide(x: Inputs, impl: Backend) -> Outputs:
    decide_blocks(x["partials"], x["state"], impl=impl)
    return ()


def _decisions(x: Inputs, _: Outputs) -> Outputs:
    decisions = x["state"].decisions
    return (decisions[:, 1].clone(), decisions[:, 0].clone())


def _decide_eager(x: Inputs) -> Outputs:
    sums = x["partials"].sum((1, 2))
    skipped = [ratio.item() < THRESHOLD for ratio in sums[:, 0] / sums[:, 1]]
    return (torch.tensor(skipped, device=sums.device).float(),)


def _make_decided(_: Shape, draw: Draw) -> Inputs:
    steps = BlockSteps.allocate(CAPACITY, [True] * BLOCKS, draw.device)
    steps.counters[ls.REFERENCE] = 1
    steps.thresholds[ls.THRESHOLD] = THRESHOLD
    changes = draw.normal(BLOCKS, dtype=torch.float32, scale=THRESHOLD).abs_()
    return {"steps": steps, "decisions": torch.stack([changes, (changes < THRESHOLD).float()], 1)}


def _step(x: Inputs, impl: Backend) -> Outputs:
    decide_step(x["steps"], x["decisions"], impl=impl)
    return ()


def _left_out(x: Inputs, _: Outputs) -> Outputs:
    return (x["steps"].flags.float(), x["steps"].values[ls.DIFF].clone())


def _step_eager(x: Inputs) -> Outputs:
    flags = [change.item() < THRESHOLD for change in x["decisions"][:, 0]]
    return (torch.tensor(flags, device=x["decisions"].device).float(),)


def _make_cached(shape: Shape, draw: Draw) -> Inputs:
    x = _make_decided(shape, draw)
    x["steps"].counters[ls.CACHED] = 1
    return x


def _tail(x: Inputs, impl: Backend) -> Outputs:
    steps = x["steps"]
    decide_tail(steps.counters, x["decisions"], steps.flags, steps.store, impl=impl)
    return ()


def _make_step(shape: Shape, draw: Draw) -> Inputs:
    x = _make(shape, draw)
    x["h_out"] = x["h"] + draw.hidden(shape, 0.5)
    x["encoder_out"] = draw.encoder(shape)
    x["store"] = torch.tensor([1, 2, 3], dtype=torch.int32, device=draw.device)
    return x


def _store(x: Inputs, impl: Backend) -> Outputs:
    streams = (x["h"], x["h_out"], x["encoder"], x["encoder_out"])
    store_block(x["state"], x["store"], 1, *streams, impl=impl)
    return ()


def _stored(x: Inputs, _: Outputs) -> Outputs:
    state = x["state"]
    added = None if state.encoder_residuals is None else state.encoder_residuals[1].clone()
    return (state.inputs[1].clone(), state.residuals[1].clone(), added)


def _store_eager(x: Inputs) -> Outputs:
    added = None if x["encoder"] is None else x["encoder_out"] - x["encoder"]
    return (x["h"].clone(), x["h_out"] - x["h"], added)


def _add(x: Inputs, impl: Backend) -> Outputs:
    state = x["state"]
    streams = (x["encoder"], state.encoder_residuals)
    return add_residuals(x["h"], state.residuals, 0, BLOCKS, *streams, impl=impl)


def _add_eager(x: Inputs) -> Outputs:
    state, h, encoder = x["state"], x["h"], x["encoder"]
    for block in range(BLOCKS):
        h = h + state.residuals[block]
        if encoder is not None:
            encoder = encoder + state.encoder_residuals[block]
    return (h, encoder)


BLOCK_OPS = [
    KernelOp(
        name=f"block_changes M={BLOCKS}",
        make=_make,
        call=_changes,
        eager=_changes_eager,
        results=_ratios,
        moved=lambda shape: (BLOCKS + 1) * shape.hidden_bytes,
    ),
    KernelOp(
        name=f"block_choice M={BLOCKS}",
        make=_make_measured,
        call=_decide,
        eager=_decide_eager,
        results=_decisions,
        moved=None,
        eager_waits=True,
    ),
    KernelOp(
        name="decide_step",
        make=_make_decided,
        call=_step,
        eager=_step_eager,
        results=_left_out,
        moved=None,
        eager_waits=True,
    ),
    KernelOp(
        name="decide_tail",
        make=_make_cached,
        call=_tail,
        eager=_step_eager,
        results=_left_out,
        moved=None,
        eager_waits=True,
    ),
    KernelOp(
        name="store_block",
        make=_make_step,
        call=_store,
        eager=_store_eager,
        results=_stored,
        moved=lambda shape: 6 * shape.hidden_bytes + 3 * shape.encoder_bytes,
    ),
    KernelOp(
        name=f"add_residuals n={BLOCKS}",
        make=_make,
        call=_add,
        eager=_add_eager,
        moved=lambda shape: (BLOCKS + 2) * (shape.hidden_bytes + shape.encoder_bytes),
    ),
]
