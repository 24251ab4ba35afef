"""One launch for the rows of a batch does, bit for bit, what one launch per lane does."""

import itertools

import pytest
import tiny
import torch

import dbcache
from dbcache.kernels.by_row.commit_rows import commit_rows
from dbcache.kernels.by_row.decide_rows import decide_rows
from dbcache.kernels.by_row.predict_rows import predict_rows
from dbcache.kernels.by_row.table import Row, Rows
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState, PlanCode, Reason
from dbcache.kernels.common.select import reset_environment
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import predict
from dbcache.lanes import row_lanes
from dbcache.testing import poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMPLS = ["triton", "reference"]
SHAPES = [(17, 5), (9, 16), (1, 2049)]
"""Of a row: odd, whole vectors of 16 bytes, and more than a block."""
ENCODER = (3, 32)
SLOTS = 3
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on what is not used
LANES = [
    {"cached": 1, "weights": (2, -1, 3)},
    {"cached": 0, "slot": 2},
    None,
    {"cached": 1, "weights": (0, 1, 0)},
    {"cached": 0, "slot": 0},
]
"""A row each: two that are cached, two full ones, and one that is left alone."""


def lane(device, *, cached=0, slot=0, weights=(), **thresholds):
    state = LaneState.allocate(12, device)
    state.counters[ls.CACHED], state.counters[ls.SLOT] = cached, slot
    # a slot of weight 0 may hold anything, and so may weights beyond the ring
    state.values[ls.WEIGHTS :] = float("nan")
    for values in (state.weights, state.encoder_weights):
        values[: len(weights)] = torch.tensor(weights, dtype=torch.float32)
    return state


def rings(device, form, shape, fill):
    """Return a ring of rows of `shape`, and its scales: of a dtype, or of fp8 for uint8."""
    if form != torch.uint8:
        return fill(SLOTS, 1, *shape, dtype=form), None
    codes = fill(SLOTS, 1, *shape).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, torch.full((SLOTS, 1, *shape[:-1]), 0.5, device=device)


def copies(row):
    if row is None:
        return None
    state, *buffers = row
    return Row(state.clone(), *[x if x is None else x.clone() for x in buffers])


def assert_same(rows, expected):
    for row, other in zip(rows, expected, strict=True):
        if row is not None:
            for x, y in zip((*row.state.tensors(), *row[1:]), (*other.state.tensors(), *other[1:]),
                            strict=True):  # fmt: skip
                assert x is y is None or torch.equal(bits(x), bits(y))


def bits(x):
    """Return the bits of a tensor, so that NaN equals NaN."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return x.contiguous().view(sizes[x.element_size()])


def strided(x):
    """Return the same values with other strides, the batch innermost."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [None, torch.float32, torch.uint8], ids=["own", "float32", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("encoder", "replace"), [(False, False), (True, False), (True, True)])
def test_predicts_the_cached_rows_and_no_other(
    integers, device, shape, dtype, form, encoder, replace, impl
):
    batch = len(LANES)
    h, second = integers(batch, *shape, dtype=dtype), None
    rows = []
    for options in LANES:
        ring = rings(device, form or dtype, shape, integers)
        extra = rings(device, form or dtype, ENCODER, integers) if encoder else (None, None)
        row = Row(lane(device, **(options or {})), None, ring[0], extra[0], ring[1], extra[1])
        rows.append(None if options is None else row)
    out, encoder_out = poisoned(*h.shape, dtype=dtype, device=device), None
    if encoder:
        second = integers(batch, *ENCODER, dtype=dtype)
        encoder_out = poisoned(*second.shape, dtype=dtype, device=device)
    given = strided(h), Rows(rows), out, None if second is None else strided(second), encoder_out
    predict_rows(*given, replace=replace, impl=impl)
    for index, (options, row) in enumerate(zip(LANES, rows, strict=True)):
        at = slice(index, index + 1)
        if not (options and options["cached"]):
            assert out[at].isnan().all()
            assert encoder_out is None or encoder_out[at].isnan().all()
            continue
        extra = (second[at], row.encoder_ring, row.state.encoder_weights) if encoder else [None] * 3
        expected = predict(
            h[at], row.ring, row.state.weights, *extra, row.scales, row.encoder_scales,
            replace=replace, impl=impl,
        )  # fmt: skip
        assert torch.equal(out[at], expected[0])
        assert not encoder or torch.equal(encoder_out[at], expected[1])
        values = row.ring.double()
        if row.scales is not None:
            values = 0.5 * row.ring.view(torch.float8_e4m3fn).double()
        total = sum(w * x for w, x in zip(options["weights"], values, strict=True) if w)
        exact = total if replace else total + h[at].double()
        assert torch.equal(out[at].double(), exact)


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [None, torch.float32, torch.uint8], ids=["own", "float32", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("what", ["residual", "hidden", "ring"])
@pytest.mark.parametrize(("encoder", "replace"), [(False, False), (True, False), (True, True)])
def test_stores_the_full_rows_and_no_other(
    integers, device, shape, dtype, form, what, encoder, replace, impl
):
    batch = len(LANES)
    h_in, h_fn, h_out = (integers(batch, *shape, dtype=dtype) for _ in range(3))
    h_in = h_in if what == "residual" else None
    rows, second = [], (None, None)
    for options in LANES:
        ring = rings(device, form or dtype, shape, integers)
        extra = rings(device, form or dtype, ENCODER, integers) if encoder else (None, None)
        p_ref = poisoned(1, *shape, dtype=dtype, device=device) if what != "ring" else None
        row = Row(lane(device, **(options or {})), p_ref, ring[0], extra[0], ring[1], extra[1])
        rows.append(None if options is None else row)
    if encoder:
        second = tuple(integers(batch, *ENCODER, dtype=dtype) for _ in range(2))
    expected = [copies(row) for row in rows]
    streams = [None if x is None else strided(x) for x in (h_in, h_fn, h_out)]
    commit_rows(*streams, Rows(rows), *second, replace=replace, impl=impl)
    for index, (options, row) in enumerate(zip(LANES, expected, strict=True)):
        if options and not options["cached"]:
            at = slice(index, index + 1)
            before, extra = None if h_in is None else h_in[at], [None] * 3
            if encoder:
                extra = [second[0][at], second[1][at], row.encoder_ring]
            commit(
                before, h_fn[at], h_out[at], row.p_ref, row.ring, row.state.counters,
                *extra, row.scales, row.encoder_scales, replace=replace, impl=impl,
            )  # fmt: skip
            exact = h_fn[at].double() - (0 if before is None else before.double())
            assert row.p_ref is None or torch.equal(row.p_ref, exact.to(dtype))
    assert_same(rows, expected)


PLANS = {
    "measured": {},
    "above": {"threshold": 0.01},
    "always": {"threshold": 1.0},
    "warmup": {"code": PlanCode.WARMUP},
    "static": {"code": PlanCode.STATIC},
    "known": {"code": ls.KNOWN + Reason.BELOW_THRESHOLD},
    "first": {"reference": 0, "code": PlanCode.WARMUP},
    "limit": {"limits": {ls.MAX_CONSECUTIVE: 0}},
    "worst": {"limits": {ls.BATCH_REDUCE: ls.BatchReduce.MAX}, "step": 7},
    "absent": None,
}


def stepped(device, threshold=0.4, code=PlanCode.DYNAMIC, reference=1, limits=None, step=3):
    """Return the state of a lane before step `step`."""
    state = LaneState.allocate(8 + step, device)
    entries = {ls.SLOTS: 3, ls.ORDER: 1, **(limits or {})}
    for entry, value in entries.items():
        state.limits[entry] = value
    state.thresholds[ls.THRESHOLD], state.thresholds[ls.IMPORTANT] = threshold, 0.3
    state.plan.fill_(int(code))
    counters = {ls.STEP: step, ls.REFERENCE: reference, ls.SNAPSHOTS: 2, ls.HEAD: 2}
    for entry, value in (counters | {ls.RING_STEPS + 1: 1}).items():
        state.counters[entry] = value
    return state


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 1400)], ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["residual", "hidden"])
@pytest.mark.parametrize("by_token", [False, True], ids=["whole", "tokens"])
def test_each_row_decides_as_its_lane_alone(random, device, shape, dtype, hidden, by_token, impl):
    batch = len(PLANS)
    h_in, h_fn = random(batch, *shape, dtype=dtype), random(batch, *shape, dtype=dtype)
    before = None if hidden else h_in
    rows = []
    for index, options in enumerate(PLANS.values()):
        exact = (h_fn if hidden else h_fn - h_in)[index : index + 1]
        p_ref = exact + 0.1 * random(1, *shape, dtype=dtype)
        row = None if options is None else Row(stepped(device, **options), p_ref.contiguous())
        rows.append(row)
    expected = [copies(row) for row in rows]
    given = [None if x is None else strided(x) for x in (before, h_fn)]
    for _ in range(2):  # the tickets are back at 0
        flags = decide_rows(*given, Rows(rows), by_token=by_token, impl=impl).tolist()
        for index, row in enumerate(expected):
            at = slice(index, index + 1)
            if row is None:
                continue
            state, counters = row.state, row.state.counters.tolist()
            if state.plan[counters[ls.STEP]] == PlanCode.DYNAMIC and counters[ls.REFERENCE] == 1:
                first = None if before is None else before[at]
                probe_and_decide(first, h_fn[at], row.p_ref, state, by_token=by_token, impl=impl)
            else:
                decide(state, None, impl=impl)
        assert_same(rows, expected)
        cached = [None if row is None else row.state.counters[ls.CACHED].item() for row in expected]
        assert [None if row is None else f for row, f in zip(rows, flags, strict=True)] == cached
    reasons = {row.state.counters[ls.REASON].item() for row in rows if row is not None}
    assert len(reasons) >= 6


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_whose_plans_decide_need_no_reference(random, device, impl):
    codes = (PlanCode.WARMUP, PlanCode.STATIC, PlanCode.MASK)
    rows = [Row(stepped(device, code=code, reference=0)) for code in codes]
    expected = [copies(row) for row in rows]
    assert decide_rows(None, random(3, 4, 8), Rows(rows), measures=False, impl=impl) is None
    for row in expected:
        decide(row.state, None, impl=impl)
    assert_same(rows, expected)


def test_the_table_is_made_anew_only_where_an_address_changes(integers, device):
    known, rows = {}, [Row(lane(device), None, integers(2, 1, 4, 8)) for _ in range(3)]
    table = Rows(rows, known).table()
    assert Rows(list(rows), known).table() is table
    rows[1].state.grow(40)
    grown = Rows(rows, known).table()
    assert grown is not table
    assert grown[1, 7] == 40
    assert torch.equal(grown[[0, 2]], table[[0, 2]])
    joined = Rows([*rows, None], known).table()
    assert joined.shape == (4, table.shape[1])
    assert not joined[3].any()
    assert list(known.values()) == [joined]  # one, however the rows change


def test_rejects_what_does_not_fit(integers, device):
    def row(*shape, dtype=torch.float32):
        ring = integers(2, 1, *shape, dtype=dtype)
        return Row(lane(device, cached=1, weights=(1, 1)), integers(1, *shape, dtype=dtype), ring)

    h, rows = integers(2, 4, 8), Rows([row(4, 8), row(4, 8)])
    with pytest.raises(ValueError, match="at least one row must have a lane"):
        Rows([None])
    for other in (row(4, 9), row(4, 8, dtype=torch.float16)):
        with pytest.raises(ValueError, match="must share shapes and dtypes"):
            Rows([row(4, 8), other])
    state, p_ref, ring, *_ = row(4, 8)
    shifted = integers(2 * 32 + 1)[1:].view(2, 1, 4, 8)
    for bad in (shifted, ring.transpose(-1, -2)):
        with pytest.raises(ValueError, match="multiple of 16 bytes"):
            Rows([Row(state, p_ref, bad)])
    out = torch.empty_like(h)
    calls = itertools.product(IMPLS, [
        (r"2 rows, as many as there are.* got \(3, 4, 8\)",
         lambda i: predict_rows(integers(3, 4, 8), rows, out, impl=i)),
        ("the output for h must be contiguous",
         lambda i: predict_rows(h, rows, out.half(), impl=i)),
        (r"ring of h must be .* got \(2, 1, 4, 8\) and \(1, 5, 8\)",
         lambda i: predict_rows(integers(2, 5, 8), rows, out, impl=i)),
        ("encoder must come with its ring",
         lambda i: predict_rows(h, rows, out, h, out, impl=i)),
        ("an output per stream", lambda i: predict_rows(h, rows, out, h, impl=i)),
        (r"2 rows, .* got \(\)", lambda i: predict_rows(h, rows, out, h[0, 0, 0], out, impl=i)),
        ("2 rows", lambda i: commit_rows(h[:1], h, h, rows, impl=i)),
        ("share a dtype", lambda i: commit_rows(h.half(), h, h, rows, impl=i)),
        ("encoder_fn must come with", lambda i: commit_rows(h, h, h, rows, h, h, impl=i)),
        ("share a shape", lambda i: decide_rows(h, integers(2, 5, 8), rows, impl=i)),
    ])  # fmt: skip
    for impl, (match, call) in calls:
        with pytest.raises(ValueError, match=match):
            call(impl)


# ---- a model --------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "fp8": {"cache_dtype": "fp8"},
    "spectrum": {"enable_spectrum": True, "enable_encoder_spectrum": True},
    "hidden": {"l1_hidden_states_diff_threshold": 0.3},
    "no warm-up": {"max_warmup_steps": 0},
    "no probe": {
        "steps_computation_mask": [1, 1, 0, 1, 0, 0, 1, 0],
        "steps_computation_policy": "static",
        "static_skip_probe": True,
    },
    "on the host": {"cache_device": "cpu"},
}


@pytest.fixture(params=IMPLS)
def kernels(request, monkeypatch):
    """Let models on the CPU run by one implementation."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off beside a GPU")
    monkeypatch.setenv("DBCACHE_KERNELS", request.param)
    reset_environment()
    yield
    monkeypatch.undo()
    reset_environment()


@torch.no_grad()
def drawn(options):
    """Draw samples of other speeds as one batch; return all outputs, and the steps of each."""
    flux = tiny.FAMILIES["flux"]
    options = {"Fn_compute_blocks": 1, "max_warmup_steps": 2} | options
    model = dbcache.enable(
        flux.build(), batch_reduce="each", residual_diff_threshold=0.3, num_inference_steps=8,
        **options,
    )  # fmt: skip
    x = torch.cat([tiny.noise(*flux.latent_shape, seed=seed) for seed in range(3)])
    speed, outputs = torch.tensor([1.0, 5.0, 2.0]).view(3, 1, 1), []
    for step in range(8):
        outputs.append(model(**flux.arguments(x, 1 - step / 8, "cond"))[0])
        x = x - speed * outputs[-1] / 8
    lanes = dbcache.summary(model, logging=False).lanes
    return outputs, [(lane.reasons, lane.cached_steps) for lane in lanes]


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_is_the_same_bits_by_row_and_one_row_after_another(kernels, monkeypatch, name):
    outputs, lanes = drawn(OPTIONS[name])
    monkeypatch.setattr(row_lanes, "is_traced", lambda x: True)
    expected, decided = drawn(OPTIONS[name])
    assert all(map(torch.equal, outputs, expected))
    assert lanes == decided
    assert all(cached for _, cached in lanes)
