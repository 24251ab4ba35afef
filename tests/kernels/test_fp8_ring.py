"""Rings in fp8: what `commit` stores and `predict` gives back, with one scale per token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.common import e4m3
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.prediction import commit as commit_module
from dbcache.kernels.prediction import predict as predict_module
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import predict
from dbcache.testing import poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 5), (5,), (1, 17, 96), (2, 17, 5), (3, 2, 513), (1, 2, 3072), (2, 1, 1000)]
IMPLS = ["triton", "reference"]
POISON = 0x7F
"""The code of NaN."""

ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
"""Of a float32 that is stored; Triton's interpreter cuts bfloat16 off instead of rounding it."""


def counters_at(slot, device):
    counters = torch.full((ls.NUM_COUNTERS,), 10**6, dtype=torch.int32, device=device)
    counters[ls.SLOT] = slot
    return counters


def weights_of(*values, device):
    return torch.tensor([*values, *[0.0] * (8 - len(values))], device=device)


def poisoned_ring(slots, shape, device):
    ring = torch.full((slots, *shape), POISON, dtype=torch.uint8, device=device)
    return ring, poisoned(slots, *shape[:-1], dtype=torch.float32, device=device)


def random_ring(random, slots, shape):
    """Return a ring of codes, its scales, and what they stand for in float64."""
    codes, scales = e4m3.quantize(random(slots, *shape))
    return codes, scales, e4m3.dequantize(codes, scales).double()


def stored(h_in, h_fn, h_out, slot, impl, encoder=(), slots=3, replace=False):
    """Commit into poisoned buffers; return P_ref and, per stream, ring and scales."""
    p_ref = poisoned(*h_in.shape, dtype=h_in.dtype, device=h_in.device)
    shapes = [h_in.shape, *[encoder[0].shape for _ in encoder[:1]]]
    rings, scales = zip(*[poisoned_ring(slots, s, h_in.device) for s in shapes], strict=True)
    counters, before = counters_at(slot, h_in.device), counters_at(slot, h_in.device)
    second = (*encoder, rings[1]) if encoder else (None,) * 3
    more = scales[1] if encoder else None
    commit(
        h_in, h_fn, h_out, p_ref, rings[0], counters, *second, scales[0], more,
        replace=replace, impl=impl,
    )  # fmt: skip
    assert torch.equal(counters, before)
    return p_ref, list(zip(rings, scales, strict=True))


def assert_slot_is(ring, scales, slot, residual):
    codes, token_scales = e4m3.quantize(residual.float())
    assert torch.equal(ring[slot], codes)
    assert torch.equal(scales[slot], token_scales)
    others = [j for j in range(len(ring)) if j != slot]
    assert (ring[others] == POISON).all()
    assert scales[others].isnan().all()


def assert_rounded(x, exact):
    assert ((x.double() - exact).abs() <= (ROUNDING[x.dtype] + 2**-23) * exact.abs()).all()


def bound(residual, scales):
    """Return how far an element may be off: the format's error, and float32's."""
    residual, scales = residual.double().abs(), scales[..., None].double()
    return torch.maximum(residual / 16, scales / 1024) * (1 + 1e-5)


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("replace", [False, True], ids=["residual", "replace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stores_the_codes_of_the_difference_in_one_slot(random, shape, dtype, replace, impl):
    h_in, h_fn, h_out = (random(*shape, dtype=dtype) for _ in range(3))
    p_ref, [(ring, scales)] = stored(h_in, h_fn, h_out, 2, impl, replace=replace)
    assert_rounded(p_ref, h_fn.double() - h_in.double())
    residual = h_out.float() if replace else h_out.float() - h_fn.float()
    assert_slot_is(ring, scales, 2, residual)
    error = e4m3.dequantize(ring[2], scales[2]).double() - residual.double()
    assert (error.abs() <= bound(residual, scales[2])).all()


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("slot", [0, 1, 2])
@pytest.mark.parametrize("replace", [False, True], ids=["residual", "replace"])
@pytest.mark.parametrize(
    "shapes", [((2, 17, 5), (2, 3, 96)), ((1, 1), (2, 40, 96)), ((1, 3, 700), (1, 5, 30))], ids=str
)
def test_both_streams_go_to_the_same_slot(random, shapes, replace, slot, impl):
    h_in, h_fn, h_out = (random(*shapes[0], dtype=torch.bfloat16) for _ in range(3))
    encoder = [random(*shapes[1], dtype=torch.bfloat16) for _ in range(2)]
    p_ref, rings = stored(h_in, h_fn, h_out, slot, impl, encoder, replace=replace)
    assert_rounded(p_ref, h_fn.double() - h_in.double())
    for (ring, scales), (before, after) in zip(rings, ((h_fn, h_out), encoder), strict=True):
        residual = after.float() if replace else after.float() - before.float()
        assert_slot_is(ring, scales, slot, residual)


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predicts_as_float64_does_from_the_same_codes(random, shape, slots, dtype, impl):
    h, weights = random(*shape, dtype=dtype), random(8)
    ring, scales, residuals = random_ring(random, slots, shape)
    out, encoder_out = predict(h, ring, weights, scales=scales, impl=impl)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert encoder_out is None
    terms = weights[:slots].double().view(-1, *[1] * h.ndim) * residuals
    exact = h.double() + terms.sum(0)
    # float32 sums of slots + 1 terms, then one rounding
    accumulated = (slots + 2) * 2**-23 * (h.double().abs() + terms.abs().sum(0))
    assert ((out.double() - exact).abs() <= accumulated + ROUNDING[dtype] * exact.abs()).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("replace", [False, True], ids=["add", "replace"])
def test_streams_have_widths_rings_and_weights_of_their_own(random, device, replace, impl):
    shapes = (2, 17, 5), (2, 3, 600)
    streams, expected = [], []
    for shape, weights in zip(shapes, ((2, -1), (0, 3)), strict=True):
        h, (ring, scales, residuals) = random(*shape), random_ring(random, 2, shape)
        streams.append((h, ring, weights_of(*weights, device=device), scales))
        total = weights[0] * residuals[0] + weights[1] * residuals[1]
        expected.append(total if replace else h.double() + total)
    (*hidden, scales), (*encoder, encoder_scales) = streams
    both = predict(*hidden, *encoder, scales, encoder_scales, replace=replace, impl=impl)
    for got, want in zip(both, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weights", [(0, 1, 0), (1, 0, 0), (0, -1, 3), (0, 0, 0)], ids=str)
def test_a_slot_without_weight_may_hold_anything(random, device, weights, impl):
    h, (ring, scales) = random(2, 17, 5), poisoned_ring(3, (2, 17, 5), device)
    expected = h.double()
    for j, weight in enumerate(weights):
        if weight:
            codes, token_scales, residual = random_ring(random, 1, h.shape)
            ring[j], scales[j] = codes[0], token_scales[0]
            expected = expected + weight * residual[0]
    out, _ = predict(h, ring, weights_of(*weights, device=device), scales=scales, impl=impl)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_is_nan_afterwards_and_nothing_else_is(random, device, impl):
    h_in, h_fn, h_out = (random(3, 7) for _ in range(3))
    h_out[0, 1], h_out[1, 2], h_fn[2, 3] = float("nan"), float("inf"), float("-inf")
    _, [(ring, scales)] = stored(h_in, h_fn, h_out, 0, impl, slots=1)
    assert_slot_is(ring, scales, 0, h_out - h_fn)
    h = torch.zeros_like(h_fn)
    out, _ = predict(h, ring, weights_of(1, device=device), scales=scales, impl=impl)
    assert torch.equal(out.isnan(), ~(h_out - h_fn).isfinite())


@pytest.mark.parametrize("impl", IMPLS)
def test_honours_strides(random, device, impl):
    h_in, h_fn = random(5, 17, 2).permute(2, 1, 0), random(2, 17, 10)[..., ::2]
    h_out = random(1, 17, 5).expand(2, 17, 5)
    p_ref, rings = stored(h_in, h_fn, h_out, 1, impl, encoder=(h_in, h_out))
    assert_rounded(p_ref, h_fn.double() - h_in.double())
    assert_slot_is(*rings[0], 1, h_out - h_fn)
    assert_slot_is(*rings[1], 1, h_out - h_in)
    ring, scales = rings[0]
    out, _ = predict(h_in, ring, weights_of(0, 1, device=device), scales=scales, impl=impl)
    expected = h_in + e4m3.dequantize(ring[1], scales[1])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert out.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_output_may_be_the_input(random, impl):
    h, weights = random(2, 17, 600), random(8)
    ring, scales, _ = random_ring(random, 2, h.shape)
    expected, _ = predict(h, ring, weights, scales=scales, impl=impl)
    got, _ = predict(h, ring, weights, scales=scales, out=h, impl=impl)
    assert got is h
    assert torch.equal(h, expected)


@pytest.mark.parametrize("op", ["commit", "predict"])
def test_both_streams_take_one_launch(random, monkeypatch, op):
    launched, module = [], {"commit": commit_module, "predict": predict_module}[op]

    class Counted:
        kernel = getattr(module, f"_{op}_fp8_kernel")

        def __getitem__(self, grid):
            launched.append(grid)
            return self.kernel[grid]

    monkeypatch.setattr(module, f"_{op}_fp8_kernel", Counted())
    h, encoder = random(2, 17, 96), random(2, 5, 64)
    if op == "commit":
        stored(h, h, h, 1, "triton", encoder=(encoder, encoder))
    else:
        (ring, scales, _), (encoder_ring, encoder_scales, _) = (
            random_ring(random, 2, x.shape) for x in (h, encoder)
        )
        second = (encoder, encoder_ring, random(8), scales, encoder_scales)
        predict(h, ring, random(8), *second, impl="triton")
    assert launched == [(3 + 1,)]  # 34 and 10 tokens, 16 per program


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    width=st.integers(0, 80) | st.sampled_from([96, 511, 513, 1100, 2049]),
    encoder_tokens=st.none() | st.integers(0, 5),
    encoder_width=st.integers(1, 40) | st.sampled_from([512, 600]),
    batch=st.integers(1, 3),
    slots=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_triton_does_what_the_reference_does_on_any_shape(
    tokens, width, encoder_tokens, encoder_width, batch, slots, dtype, seed
):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    h_in, h_fn, h_out = (make(batch, tokens, width) for _ in range(3))
    encoder = ()
    if encoder_tokens is not None:
        encoder = tuple(make(batch, encoder_tokens, encoder_width) for _ in range(2))
    slot = seed % slots
    results, weights = [], weights_of(*[float(j == slot) for j in range(slots)], device=device)
    for impl in IMPLS:
        p_ref, rings = stored(h_in, h_fn, h_out, slot, impl, encoder, slots=slots)
        second = (encoder[0], rings[1][0], weights) if encoder else (None,) * 3
        scales = [scale for _, scale in rings]
        out = predict(h_fn, rings[0][0], weights, *second, *scales, impl=impl)
        stored_codes = [ring[slot] for ring, _ in rings]
        results.append((p_ref, stored_codes, out))
        for ring, its_scales in rings:
            if ring.numel():
                assert not its_scales[slot].isnan().any()
    (p_ref, codes, out), (p_ref_reference, codes_reference, expected) = results
    rounding = {"rtol": ROUNDING[dtype], "atol": 1e-5}
    torch.testing.assert_close(p_ref, p_ref_reference, **rounding)
    for a, b in zip(codes, codes_reference, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(out, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **rounding)


@pytest.mark.parametrize("width", [1, 5, 96, 128, 512, 513, 3072, 5120, 8192, e4m3.MAX_WIDTH])
def test_tiles_are_whole_and_threads_have_16_codes(width):
    rows, columns, warps = commit_module.fp8_tile(width, 2)
    assert columns >= width
    assert columns < 2 * max(width, 16)
    assert 16 <= rows * columns / (32 * warps) <= 32
    rows, columns, _ = predict_module.fp8_tile(width, 2)
    assert rows * columns == predict_module.BLOCK == 16 * 128


def test_rejects_what_does_not_fit():
    x, ring, weights = torch.zeros(2, 3), torch.zeros(1, 2, 3, dtype=torch.uint8), torch.zeros(8)
    plain, scales, counters = torch.zeros(1, 2, 3), torch.zeros(1, 2), counters_at(0, "cpu")
    for op, call in {
        "commit": lambda ring, scales: commit(x, x, x, x, ring, counters, scales=scales),
        "predict": lambda ring, scales: predict(x, ring, weights, scales=scales),
    }.items():
        with pytest.raises(ValueError, match=rf"^{op}: .*dtype of .*got .*torch.uint8"):
            call(ring, None)
        with pytest.raises(ValueError, match=rf"^{op}: .*with scales must be .*uint8"):
            call(plain, scales)
        with pytest.raises(ValueError, match=rf"^{op}: .*float32 \(1, 2\) on cpu, got .*\(1, 3\)"):
            call(ring, torch.zeros(1, 3))
        with pytest.raises(ValueError, match=rf"^{op}: the scales .*, got torch.float16"):
            call(ring, scales.half())
        with pytest.raises(ValueError, match=rf"^{op}: the scales .* must be contiguous"):
            call(ring, torch.zeros(1, 4)[:, ::2])
        with pytest.raises(ValueError, match=rf"^{op}: the scales .* on cpu, got .*meta"):
            call(ring, scales.to("meta"))
    with pytest.raises(ValueError, match="both rings must be fp8 or none"):
        commit(x, x, x, x, ring, counters, x, x, plain, scales)
    with pytest.raises(ValueError, match="both rings must be fp8 or none"):
        predict(x, plain, weights, x, ring, weights, None, scales)
    wide = torch.zeros(1, 20000)
    with pytest.raises(ValueError, match=r"\(\.\.\., D\) with D <= 16384, got \(1, 20000\)"):
        predict(wide, wide[None].byte(), weights, scales=torch.zeros(1, 1))


def fp8_arguments(random, device, encoder):
    """Return what `commit` and `predict` take, per stream."""
    shapes = ((2, 3, 5), (2, 4, 7))[: 1 + encoder]
    rings = [random_ring(random, 2, shape)[:2] for shape in shapes]
    fn_and_out = [[random(*shape) for _ in range(2)] for shape in shapes]
    return fn_and_out, [r for r, _ in rings], [s for _, s in rings] + [None] * (not encoder)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("encoder", [False, True])
def test_the_ops_are_registered_as_they_behave(random, device, encoder, impl):
    streams, rings, scales = fp8_arguments(random, device, encoder)
    hidden, weights = streams[0], random(8)
    second, second_ring = (streams[1], rings[1]) if encoder else ((None, None), None)
    kept = (rings[0], counters_at(1, device), random(2, 3, 5), second_ring)
    args = ([*hidden, random(2, 3, 5), *second], *kept, *scales, False, impl)
    torch.library.opcheck(torch.ops.dbcache.commit.default, args)
    outputs = (torch.empty_like(hidden[0]), torch.empty_like(streams[1][0]) if encoder else None)
    kept = [rings[0], weights, second_ring, weights if encoder else None, *scales]
    args = (*outputs, [hidden[0], second[0]], kept, False, impl)
    torch.library.opcheck(torch.ops.dbcache.predict.default, args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("encoder", [False, True])
def test_a_compiled_step_is_one_graph_and_does_the_same(random, device, encoder, impl):
    def step(h_in, p_ref, counters, weights, streams, rings, scales):
        second = (*streams[1], rings[1]) if encoder else (None,) * 3
        commit(h_in, *streams[0], p_ref, rings[0], counters, *second, *scales, impl=impl)
        second = (streams[1][0], rings[1], weights) if encoder else (None,) * 3
        return predict(streams[0][0], rings[0], weights, *second, *scales, impl=impl)

    def copies(x):
        return x.clone() if isinstance(x, torch.Tensor) else x and [copies(y) for y in x]

    first = [random(2, 3, 5), random(2, 3, 5), counters_at(1, device), random(8)]
    args = [*first, *fp8_arguments(random, device, encoder)]
    compiled_args = copies(args)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(*args), compiled(*compiled_args)
    assert torch.equal(expected[0], got[0])
    assert expected[1] is None or torch.equal(expected[1], got[1])
    for buffers, compiled_buffers in zip(args[5:], compiled_args[5:], strict=True):
        for x, y in zip(buffers, compiled_buffers, strict=True):
            assert x is y is None or torch.equal(x, y)
