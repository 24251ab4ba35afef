"""What the kernels move: each element of each tensor at most once, and nothing that need not move.

Triton's interpreter executes the loads and stores of a kernel on real addresses. They are written
down and counted per element, so that a second pass over a tensor, an overlap of two programs or a
read of a ring slot without weight shows.
"""

import numpy as np
import pytest
import torch

from dbcache.kernels.by_row.commit_rows import commit_rows
from dbcache.kernels.by_row.decide_rows import decide_rows
from dbcache.kernels.by_row.predict_rows import predict_rows
from dbcache.kernels.by_row.table import Row, Rows
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.fit_recurrence import fit_recurrence
from dbcache.kernels.prediction.predict import predict
from dbcache.kernels.pruning.add_residuals import add_residuals
from dbcache.kernels.pruning.block_changes import block_changes
from dbcache.kernels.pruning.block_state import BlockState
from dbcache.kernels.pruning.store_block import store_block

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts in Triton's interpreter, which is off beside a GPU"
)

SHAPES = {"hidden": (2, 17, 160), "encoder": (2, 5, 96)}
SLOTS, SLOT = 3, 1
FORMS = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "fp8 ring": (torch.bfloat16, torch.uint8),
}


class Traffic:
    """Addresses that kernels load from and store to."""

    def __init__(self, builder):
        self.loads, self.stores = [], []
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(ptrs, mask, *args, **kwargs):
            self.loads.append(self._addresses(ptrs, mask))
            return load(ptrs, mask, *args, **kwargs)

        def counted_store(ptrs, value, mask, *args, **kwargs):
            self.stores.append(self._addresses(ptrs, mask))
            return store(ptrs, value, mask, *args, **kwargs)

        self.load, self.store = counted_load, counted_store

    @staticmethod
    def _addresses(ptrs, mask):
        pointers, active = np.broadcast_arrays(ptrs.data, mask.data)
        return pointers[active.astype(bool)].astype(np.int64)

    def counts(self, tensor, kind):
        """Return how often each element of a contiguous `tensor` was loaded or stored."""
        moved = getattr(self, kind)
        addresses = np.concatenate(moved) if moved else np.zeros(0, np.int64)
        index = (addresses - tensor.data_ptr()) // tensor.element_size()
        index = index[(index >= 0) & (index < tensor.numel())]
        return torch.from_numpy(np.bincount(index, minlength=tensor.numel())).view(tensor.shape)


@pytest.fixture
def traffic(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    log = Traffic(interpreter_builder)
    monkeypatch.setattr(interpreter_builder, "create_masked_load", log.load)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", log.store)
    return log


class Step:
    """The tensors of one step with two streams."""

    def __init__(self, random, form):
        dtype, ring_dtype = FORMS[form]
        hidden, encoder = SHAPES["hidden"], SHAPES["encoder"]
        self.h_in, self.h_fn, self.h_out, self.p_ref = (
            random(*hidden, dtype=dtype) for _ in range(4)
        )
        self.encoder_fn, self.encoder_out = (random(*encoder, dtype=dtype) for _ in range(2))
        self.out, self.encoder_to = torch.empty_like(self.h_fn), torch.empty_like(self.encoder_fn)
        self.ring, self.encoder_ring = (
            torch.zeros(SLOTS, *shape, dtype=ring_dtype) for shape in (hidden, encoder)
        )
        self.scales = self.encoder_scales = None
        if ring_dtype == torch.uint8:
            self.scales, self.encoder_scales = (
                torch.zeros(SLOTS, *shape[:-1]) for shape in (hidden, encoder)
            )
        self.state = LaneState.allocate(8, "cpu")
        self.state.counters[ls.REFERENCE] = 1
        self.state.counters[ls.SLOT] = SLOT

    def decide(self):
        probe_and_decide(self.h_in, self.h_fn, self.p_ref, self.state, impl="triton")

    def commit(self, h_in, p_ref):
        commit(
            h_in, self.h_fn, self.h_out, p_ref, self.ring, self.state.counters,
            self.encoder_fn, self.encoder_out, self.encoder_ring,
            self.scales, self.encoder_scales, impl="triton",
        )  # fmt: skip

    def predict(self, weights):
        weights = torch.tensor([*weights, *[0.0] * (ls.MAX_SLOTS - len(weights))])
        predict(
            self.h_fn, self.ring, weights, self.encoder_fn, self.encoder_ring, weights,
            self.scales, self.encoder_scales,
            out=self.out, encoder_out=self.encoder_to, impl="triton",
        )  # fmt: skip

    def tensors(self):
        """Return the tensors whose size is that of a stream, by name."""
        named = {name: value for name, value in vars(self).items() if name != "state"}
        return {name: value for name, value in named.items() if value is not None}


def assert_moves(step, traffic, *, loads, stores, slots=()):
    """Check that whole tensors (of rings: whole slots) are moved once, and all others never."""
    nbytes = 0
    for name, tensor in step.tensors().items():
        for kind, moved in (("loads", loads), ("stores", stores)):
            expected = torch.zeros(tensor.shape, dtype=torch.int64)
            if name in moved:
                per_slot = "ring" in name or "scales" in name
                expected[list(slots) if per_slot else slice(None)] = 1
            assert torch.equal(traffic.counts(tensor, kind), expected), (name, kind)
            nbytes += int(expected.sum()) * tensor.element_size()
    return nbytes


def bytes_of(form, hidden, encoder):
    """Return the bytes of `hidden` and `encoder` passes, each (in the dtype, over a ring slot)."""
    dtype, ring_dtype = FORMS[form]
    total = 0.0
    for shape, (plain, slots) in zip(SHAPES.values(), (hidden, encoder), strict=True):
        per_slot = ring_dtype.itemsize + (4 / shape[-1] if ring_dtype == torch.uint8 else 0)
        total += np.prod(shape) * (plain * dtype.itemsize + slots * per_slot)
    return round(total)


def with_scales(step, *rings):
    names = {"ring": "scales", "encoder_ring": "encoder_scales"}
    return [*rings, *(names[ring] for ring in rings if step.scales is not None)]


@pytest.mark.parametrize("form", FORMS)
def test_measurement_and_decision_read_three_tensors_once(random, traffic, form):
    step = Step(random, form)
    step.decide()
    moved = assert_moves(step, traffic, loads=("h_in", "h_fn", "p_ref"), stores=())
    assert moved == bytes_of(form, hidden=(3, 0), encoder=(0, 0))
    assert step.state.counters[ls.STEP] == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_full_step_reads_its_inputs_once_and_writes_one_slot(random, traffic, form):
    step = Step(random, form)
    step.commit(step.h_in, step.p_ref)
    moved = assert_moves(
        step,
        traffic,
        loads=("h_in", "h_fn", "h_out", "encoder_fn", "encoder_out"),
        stores=("p_ref", *with_scales(step, "ring", "encoder_ring")),
        slots=(SLOT,),
    )
    assert moved == bytes_of(form, hidden=(4, 1), encoder=(2, 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compares", [True, False])
def test_where_hidden_states_or_none_are_compared_a_full_step_moves_less(
    random, traffic, form, compares
):
    step = Step(random, form)
    step.commit(None, step.p_ref if compares else None)
    moved = assert_moves(
        step,
        traffic,
        loads=("h_fn", "h_out", "encoder_fn", "encoder_out"),
        stores=(*["p_ref"] * compares, *with_scales(step, "ring", "encoder_ring")),
        slots=(SLOT,),
    )
    assert moved == bytes_of(form, hidden=(2 + compares, 1), encoder=(2, 1))


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0), (2.0, 0.0, -1.0), (3.0, -3.0, 1.0)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_cached_step_reads_the_slots_that_have_a_weight(random, traffic, form, weights):
    step = Step(random, form)
    used = [slot for slot, weight in enumerate(weights) if weight]
    step.predict(weights)
    rings = with_scales(step, "ring", "encoder_ring")
    stores = ("out", "encoder_to")
    loads = ("h_fn", "encoder_fn", *rings)
    moved = assert_moves(step, traffic, loads=loads, stores=stores, slots=used)
    assert moved == bytes_of(form, hidden=(2, len(used)), encoder=(2, len(used)))


@pytest.mark.parametrize("form", ["bfloat16", "float32"])
@pytest.mark.parametrize(("steps", "used"), [((0, 1, 2), 3), ((5, 4, 3), 0), ((0, 9, 10), 0)])
def test_a_fit_reads_each_snapshot_once_where_there_is_something_to_fit(
    random, traffic, form, steps, used
):
    step = Step(random, form)
    counters = step.state.counters
    counters[ls.SNAPSHOTS], counters[ls.HEAD] = 3 if used or steps[0] == 0 else 2, 0
    counters[ls.RING_STEPS : ls.RING_STEPS + 3] = torch.tensor(steps)
    fit_recurrence(step.ring, step.state, torch.zeros(2, dtype=torch.float64), impl="triton")
    moved = assert_moves(step, traffic, loads=("ring",), stores=(), slots=range(used))
    assert moved == bytes_of(form, hidden=(0, used), encoder=(0, 0))


@pytest.mark.parametrize("verb", ["decide", "predict", "commit"])
def test_a_launch_by_row_moves_the_rows_that_it_concerns_once(random, traffic, verb):
    """Row 0 is measured and cached, row 1 fixed as full, row 2 of no lane."""
    h_in, h, h_out, out = (random(3, 17, 160) for _ in range(4))
    rows = [
        Row(LaneState.allocate(8, "cpu"), random(1, 17, 160), random(SLOTS, 1, 17, 160))
        for _ in range(2)
    ]
    for cached, row in zip((1, 0), rows, strict=True):
        row.state.counters[ls.REFERENCE], row.state.counters[ls.CACHED] = 1, cached
        row.state.counters[ls.SLOT], row.state.weights[SLOT] = SLOT, 2.0
    rows[1].state.plan.fill_(int(ls.PlanCode.MASK))
    batch = Rows([*rows, None])
    if verb == "decide":
        decide_rows(h_in, h, batch, impl="triton")
        loaded, concerns, stored = {"h_in": h_in, "h": h, "p_ref": rows[0].p_ref}, 0, {}
    elif verb == "predict":
        predict_rows(h, batch, out, impl="triton")
        loaded, concerns, stored = {"h": h, "ring": rows[0].ring}, 0, {"out": out}
    else:
        commit_rows(h_in, h, h_out, batch, impl="triton")
        loaded, concerns = {"h_in": h_in, "h": h, "h_out": h_out}, 1
        stored = {"p_ref": rows[1].p_ref, "ring": rows[1].ring}
    given = {"h_in": h_in, "h": h, "h_out": h_out, "out": out}
    for index, row in enumerate(rows):
        for name, x in (("p_ref", row.p_ref), ("ring", row.ring)):
            given[name if index == concerns else f"other {name}"] = x
    for name, x in given.items():
        for kind, moved in (("loads", loaded), ("stores", stored)):
            expected = torch.zeros(x.shape, dtype=torch.int64)
            if name in moved:
                part = {"ring": SLOT, "p_ref": 0}.get(name, concerns)
                expected[part] = 1
            assert torch.equal(traffic.counts(x, kind), expected), (name, kind)


def test_a_second_pass_would_be_seen(random, traffic):
    step = Step(random, "float32")
    for _ in range(2):
        step.decide()
    with pytest.raises(AssertionError, match="h_in"):
        assert_moves(step, traffic, loads=("h_in", "h_fn", "p_ref"), stores=())


BLOCKS = 4


@pytest.fixture
def blocks(random):
    """Return the state of a run of blocks, and what the streams are before and after one."""
    x, y = (random(*shape) for shape in SHAPES.values())
    state = BlockState.allocate(x, y, [True] * BLOCKS, [0.0] * 4, impl="triton")
    state.inputs.copy_(random(BLOCKS, *x.shape))
    return state, (x, x + 1, y, y + 1)


def assert_blocks_move(traffic, tensor, kind, which):
    expected = torch.zeros(tensor.shape, dtype=torch.int64)
    expected[list(which)] = 1
    assert torch.equal(traffic.counts(tensor, kind), expected)


@pytest.mark.parametrize(("stamps", "read"), [((3, 3, 3, 3), ()), ((1, 3, 3, 2), (0, 2))])
def test_changes_of_all_blocks_take_one_pass_over_their_inputs(blocks, traffic, stamps, read):
    """And over the residuals behind which the step changes; nothing is written but sums."""
    state, (x, *_) = blocks
    state.stamps.copy_(torch.tensor(stamps))
    block_changes(x, state.inputs, state.residuals, state.stamps, impl="triton")
    assert_blocks_move(traffic, x, "loads", range(len(x)))
    assert_blocks_move(traffic, state.inputs, "loads", range(BLOCKS))
    assert_blocks_move(traffic, state.residuals, "loads", read)
    for tensor in (x, state.inputs, state.residuals):
        assert_blocks_move(traffic, tensor, "stores", ())


@pytest.mark.parametrize("due", [0, 1, 2], ids=["not due", "the first time", "again"])
def test_a_block_that_runs_is_stored_in_one_pass(blocks, traffic, due):
    state, streams = blocks
    store = torch.tensor([1, due, 5], dtype=torch.int32)
    store_block(state, store, 2, *streams, impl="triton")
    for tensor in streams:
        assert_blocks_move(traffic, tensor, "loads", range(len(tensor)) if due else ())
    for tensor, is_read in (
        (state.inputs, due > 1), (state.residuals, due > 1), (state.encoder_residuals, False)
    ):  # fmt: skip
        assert_blocks_move(traffic, tensor, "loads", (2,) if is_read else ())
        assert_blocks_move(traffic, tensor, "stores", (2,) if due else ())


def test_a_run_of_blocks_is_left_out_in_one_pass(blocks, traffic):
    state, (x, _, y, _) = blocks
    outputs = add_residuals(x, state.residuals, 1, 2, y, state.encoder_residuals, impl="triton")
    for given, residuals, out in zip(
        (x, y), (state.residuals, state.encoder_residuals), outputs, strict=True
    ):
        assert_blocks_move(traffic, given, "loads", range(len(given)))
        assert_blocks_move(traffic, residuals, "loads", (1, 2))
        assert_blocks_move(traffic, out, "stores", range(len(out)))
