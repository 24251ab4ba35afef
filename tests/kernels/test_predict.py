import pytest
import torch

from dbcache.kernels.prediction import predict as module
from dbcache.kernels.prediction.predict import predict
from dbcache.testing import assert_as_accurate, poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1,), (1, 1, 5), (2, 17, 96), (3, 17, 5), (module.BLOCK - 1,), (module.BLOCK + 1,)]
IMPLS = ["triton", "reference"]


def weights_of(*values, device):
    return torch.tensor([*values, *[0.0] * (8 - len(values))], device=device)


def combined(h, ring, weights, replace=False):
    """Return the sum in float64, over the slots with a weight."""
    total = torch.zeros_like(h, dtype=torch.float64) if replace else h.double()
    for weight, residual in zip(weights.tolist(), ring, strict=False):
        if weight:
            total = total + weight * residual.double()
    return total


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("replace", [False, True], ids=["add", "replace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_integers_are_exact(integers, device, shape, dtype, replace, impl):
    h, ring = integers(*shape, dtype=dtype), integers(3, *shape, dtype=dtype)
    weights = weights_of(2, -1, 3, device=device)
    out, encoder_out = predict(h, ring, weights, replace=replace, impl=impl)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert encoder_out is None
    assert torch.equal(out.double(), combined(h, ring, weights, replace))


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [1, 2, 5, 8])
def test_is_as_accurate_as_plain_torch(random, device, slots, dtype, impl):
    h, ring, weights = random(2, 17, 96, dtype=dtype), random(slots, 2, 17, 96, dtype=dtype), None
    weights = random(8)
    plain = h.clone()
    for j in range(slots):
        plain = plain + weights[j].to(dtype) * ring[j]
    out, _ = predict(h, ring, weights, impl=impl)
    assert_as_accurate(out, plain, combined(h, ring, weights))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("replace", [False, True], ids=["add", "replace"])
@pytest.mark.parametrize("shapes", [((2, 17, 5), (2, 3, 96)), ((1, 1), (2, 40, 96))], ids=str)
def test_both_streams_have_sizes_and_weights_of_their_own(integers, device, shapes, replace, impl):
    h, encoder = (integers(*shape) for shape in shapes)
    ring, encoder_ring = (integers(2, *shape) for shape in shapes)
    weights, encoder_weights = weights_of(2, -1, device=device), weights_of(0, 3, device=device)
    out, encoder_out = predict(
        h, ring, weights, encoder, encoder_ring, encoder_weights, replace=replace, impl=impl
    )
    assert torch.equal(out.double(), combined(h, ring, weights, replace))
    expected = combined(encoder, encoder_ring, encoder_weights, replace)
    assert torch.equal(encoder_out.double(), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weights", [(0, 1, 0), (0, 2, 0), (1, 0, 0), (0, -1, 3)], ids=str)
def test_a_slot_without_weight_may_hold_anything(integers, device, weights, impl):
    h, ring = integers(2, 17, 5), poisoned(3, 2, 17, 5, dtype=torch.float32, device=device)
    for j, weight in enumerate(weights):
        if weight:
            ring[j] = integers(2, 17, 5)
    weights = weights_of(*weights, device=device)
    for replace in (False, True):
        out, _ = predict(h, ring, weights, replace=replace, impl=impl)
        assert torch.equal(out.double(), combined(h, ring, weights, replace))


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_beyond_the_ring_are_not_used(integers, device, impl):
    h, ring = integers(3, 5), integers(2, 3, 5)
    weights = torch.full((8,), float("nan"), device=device)
    weights[:2] = torch.tensor([1.0, 2.0])
    out, _ = predict(h, ring, weights, impl=impl)
    assert torch.equal(out.double(), combined(h, ring, weights))


@pytest.mark.parametrize("impl", IMPLS)
def test_replace_does_not_look_at_h(integers, device, impl):
    ring = integers(2, 3, 5)
    h = poisoned(3, 5, dtype=torch.float32, device=device)
    for weights in ((0, 1), (2, 1)):
        weights = weights_of(*weights, device=device)
        out, _ = predict(h, ring, weights, replace=True, impl=impl)
        assert torch.equal(out.double(), combined(h, ring, weights, replace=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_honours_strides_and_leaves_its_inputs_alone(integers, device, impl):
    h, ring = integers(5, 17, 2).permute(2, 1, 0), integers(2, 2, 17, 5)
    before = h.clone(), ring.clone()
    weights = weights_of(1, 1, device=device)
    out, _ = predict(h, ring, weights, impl=impl)
    assert out.is_contiguous()
    assert torch.equal(out.double(), combined(h, ring, weights))
    assert torch.equal(h, before[0])
    assert torch.equal(ring, before[1])
    assert out.data_ptr() != h.data_ptr()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weights", [(1,), (3,), (1, 2)], ids=str)
def test_the_ring_may_have_another_dtype(integers, device, weights, impl):
    h, ring = integers(3, 5, dtype=torch.bfloat16), integers(2, 3, 5)
    weights = weights_of(*weights, device=device)
    out, _ = predict(h, ring, weights, impl=impl)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.double(), combined(h, ring, weights))


def test_reuse_of_one_slot_rounds_once(random, device):
    h, ring = random(4, 17, dtype=torch.float16), random(1, 4, 17, dtype=torch.float16)
    expected = (h.float() + ring[0].float()).half()
    for impl in IMPLS:
        assert torch.equal(predict(h, ring, weights_of(1, device=device), impl=impl)[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("encoder", [False, True])
def test_the_output_may_be_given_and_may_be_the_input(integers, device, encoder, impl):
    stream = (integers(2, 17, 5), integers(2, 2, 17, 5), weights_of(2, -1, device=device))
    second = (integers(2, 3), integers(2, 2, 3), weights_of(0, 3, device=device)) * encoder
    expected, encoder_expected = predict(*stream, *second, impl=impl)
    out = poisoned(2, 17, 5, dtype=torch.float32, device=device)
    got, encoder_got = predict(*stream, *second, out=out, impl=impl)
    assert got is out
    assert torch.equal(out, expected)
    given = {"out": stream[0], "encoder_out": second[0] if encoder else None}
    got, encoder_got = predict(*stream, *second, **given, impl=impl)
    assert got is stream[0]
    assert encoder_got is given["encoder_out"]
    assert torch.equal(got, expected)
    if encoder:
        assert torch.equal(encoder_got, encoder_expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_compiled_prediction_in_place_is_one_graph(random, device, impl):
    h, ring, weights = random(2, 3, 5), random(2, 2, 3, 5), random(8)

    def step(h, ring, weights):
        h = h + 1
        predict(h, ring, weights, out=h, impl=impl)
        return h * 2

    expected = step(h, ring, weights)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(h, ring, weights), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_stream_is_allowed(integers, device, impl):
    weights = weights_of(1, device=device)
    h, ring = integers(1, 3, 5), integers(1, 1, 3, 5)
    empty, empty_ring = integers(1, 0, 5), integers(1, 1, 0, 5)
    out, encoder_out = predict(h, ring, weights, empty, empty_ring, weights, impl=impl)
    assert torch.equal(out, h + ring[0])
    assert encoder_out.shape == (1, 0, 5)
    assert predict(empty, empty_ring, weights, impl=impl)[0].shape == (1, 0, 5)


def test_inputs_may_require_grad_and_the_result_does_not(random, device):
    h, ring = random(3, 5).requires_grad_(), random(1, 3, 5).requires_grad_()
    for impl in IMPLS:
        assert not predict(h, ring, weights_of(1, device=device), impl=impl)[0].requires_grad


def test_rejects_what_does_not_fit():
    h, ring, weights = torch.zeros(2, 3), torch.zeros(2, 2, 3), torch.zeros(8)
    with pytest.raises(ValueError, match=r"ring of h must be .* got \(2, 3, 2\) and \(2, 3\)"):
        predict(h, torch.zeros(2, 3, 2), weights)
    with pytest.raises(ValueError, match=r"1 <= K <= 8, got \(9, 2, 3\)"):
        predict(h, torch.zeros(9, 2, 3), weights)
    with pytest.raises(ValueError, match="ring of h must be contiguous"):
        predict(h, torch.zeros(2, 3, 2).transpose(1, 2), weights)
    with pytest.raises(ValueError, match=r"weights of h must be float32 \(8,\)"):
        predict(h, ring, weights[:2])
    with pytest.raises(ValueError, match="encoder must come with its ring and weights"):
        predict(h, ring, weights, h)
    with pytest.raises(ValueError, match="share the slots"):
        predict(h, ring, weights, h, ring[:1], weights)
    with pytest.raises(ValueError, match=r"output for h must be contiguous .* got .*\(3, 2\)"):
        predict(h, ring, weights, out=torch.zeros(3, 2))
    with pytest.raises(
        ValueError, match=r"output for encoder must be contiguous float32 .* got .*16"
    ):
        predict(h, ring, weights, h, ring, weights, encoder_out=h.half())
    with pytest.raises(ValueError, match=r"dtype of .* got .*float64"):
        predict(h.double(), ring, weights)
    with pytest.raises(ValueError, match=r"weights of h must be .* on cpu, got .* meta"):
        predict(h, ring, weights.to("meta"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("encoder", [False, True])
def test_the_op_is_registered_as_it_behaves(random, encoder, impl):
    stream = (random(2, 3, 5), random(2, 2, 3, 5), random(8))
    second = (random(2, 2, 7), random(2, 2, 2, 7), random(8)) if encoder else (None,) * 3
    op = torch.ops.dbcache.predict.default
    outputs = (torch.empty_like(stream[0]), None if second[0] is None else second[0].clone())
    (h, *stored), (encoder_h, *encoder_stored) = stream, second
    kept = [*stored, *encoder_stored, None, None]
    args = (*outputs, [h, encoder_h], kept, False, impl)
    torch.library.opcheck(op, args)
