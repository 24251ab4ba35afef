import pytest
import torch

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.prediction import commit as module
from dbcache.kernels.prediction.commit import commit
from dbcache.testing import poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1,), (1, 1, 5), (2, 17, 96), (3, 17, 5), (module.BLOCK - 1,), (module.BLOCK + 1,)]
IMPLS = ["triton", "reference"]


def counters_at(slot, device):
    counters = torch.full((ls.NUM_COUNTERS,), 10**6, dtype=torch.int32, device=device)
    counters[ls.SLOT] = slot
    return counters


def assert_only_slot_written(ring, slot, expected):
    assert torch.equal(ring[slot], expected)
    others = [j for j in range(len(ring)) if j != slot]
    assert ring[others].isnan().all()


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("replace", [False, True], ids=["residual", "replace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stores_exact_differences_in_one_slot(integers, device, shape, dtype, replace, impl):
    h_in, h_fn, h_out = (integers(*shape, dtype=dtype) for _ in range(3))
    p_ref = poisoned(*shape, dtype=dtype, device=device)
    ring = poisoned(3, *shape, dtype=dtype, device=device)
    counters = counters_at(2, device)
    before = counters.clone()
    commit(h_in, h_fn, h_out, p_ref, ring, counters, replace=replace, impl=impl)
    assert torch.equal(p_ref, h_fn - h_in)
    assert_only_slot_written(ring, 2, h_out if replace else h_out - h_fn)
    assert torch.equal(counters, before)


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("replace", [False, True], ids=["residual", "replace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_h_in_the_hidden_states_are_what_is_compared(
    integers, device, shape, dtype, replace, impl
):
    h_fn, h_out = (integers(*shape, dtype=dtype) for _ in range(2))
    p_ref = poisoned(*shape, dtype=dtype, device=device)
    ring = poisoned(3, *shape, dtype=dtype, device=device)
    commit(None, h_fn, h_out, p_ref, ring, counters_at(1, device), replace=replace, impl=impl)
    assert torch.equal(p_ref, h_fn)
    assert_only_slot_written(ring, 1, h_out if replace else h_out - h_fn)


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("replace", [False, True], ids=["residual", "replace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fp8", [False, True], ids=["model", "fp8"])
def test_without_p_ref_only_the_rings_are_written(random, device, fp8, dtype, replace, impl):
    streams = [random(2, 17, 5, dtype=dtype) for _ in range(2)]
    second = [random(2, 3, 96, dtype=dtype) for _ in range(2)]
    stored = []
    for p_ref in (torch.empty_like(streams[0]), None):
        shapes = (streams[0].shape, second[0].shape)
        kind = torch.uint8 if fp8 else dtype
        rings = [torch.full((3, *shape), 77, dtype=kind, device=device) for shape in shapes]
        scales = [torch.zeros(3, *shape[:-1], device=device) if fp8 else None for shape in shapes]
        commit(
            None, *streams, p_ref, rings[0], counters_at(1, device), *second, rings[1], *scales,
            replace=replace, impl=impl,
        )  # fmt: skip
        stored.append([*rings, *(scales if fp8 else [])])
    assert all(map(torch.equal, *stored))
    assert (stored[1][0][[0, 2]] == 77).all()
    assert (stored[1][0][1] != 77).any()


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("slot", [0, 1, 2])
@pytest.mark.parametrize("replace", [False, True], ids=["residual", "replace"])
@pytest.mark.parametrize("shapes", [((2, 17, 5), (2, 3, 96)), ((1, 1), (2, 40, 96))], ids=str)
def test_both_streams_go_to_the_same_slot(integers, device, shapes, replace, slot, impl):
    h_in, h_fn, h_out = (integers(*shapes[0]) for _ in range(3))
    encoder_fn, encoder_out = (integers(*shapes[1]) for _ in range(2))
    p_ref = poisoned(*shapes[0], dtype=torch.float32, device=device)
    rings = [poisoned(3, *shape, dtype=torch.float32, device=device) for shape in shapes]
    commit(
        h_in, h_fn, h_out, p_ref, rings[0], counters_at(slot, device),
        encoder_fn, encoder_out, rings[1], replace=replace, impl=impl,
    )  # fmt: skip
    assert torch.equal(p_ref, h_fn - h_in)
    assert_only_slot_written(rings[0], slot, h_out if replace else h_out - h_fn)
    assert_only_slot_written(rings[1], slot, encoder_out if replace else encoder_out - encoder_fn)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_differences_round_once(random, device, dtype, impl):
    h_in, h_fn, h_out = (random(17, 5, dtype=dtype) for _ in range(3))
    p_ref, ring = torch.empty_like(h_in), torch.empty_like(h_in)[None]
    commit(h_in, h_fn, h_out, p_ref, ring, counters_at(0, device), impl=impl)
    assert torch.equal(p_ref, (h_fn.double() - h_in.double()).to(dtype))
    assert torch.equal(ring[0], (h_out.double() - h_fn.double()).to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_storage_may_have_another_dtype(random, device, impl):
    h_in, h_fn, h_out = (random(17, 5, dtype=torch.bfloat16) for _ in range(3))
    p_ref = poisoned(17, 5, dtype=torch.float32, device=device)
    ring = poisoned(1, 17, 5, dtype=torch.float16, device=device)
    commit(h_in, h_fn, h_out, p_ref, ring, counters_at(0, device), impl=impl)
    assert torch.equal(p_ref, h_fn.float() - h_in.float())
    assert torch.equal(ring[0], (h_out.float() - h_fn.float()).half())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_stored_differs_from_itself_by_exactly_nothing(random, device, dtype, impl):
    h_in, h_fn = random(2, 17, 5, dtype=dtype), random(2, 17, 5, dtype=dtype)
    p_ref, ring = torch.empty_like(h_in), torch.empty_like(h_in)[None]
    commit(h_in, h_fn, h_fn, p_ref, ring, counters_at(0, device), impl=impl)
    assert probe_diff(h_in, h_fn, p_ref, impl=impl)[..., 0].abs().max() == 0
    assert ring.abs().max() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_honours_strides(integers, device, impl):
    h_in, h_fn = integers(5, 17, 2).permute(2, 1, 0), integers(2, 17, 10)[..., ::2]
    h_out = integers(1, 17, 5).expand(2, 17, 5)
    p_ref = poisoned(2, 17, 5, dtype=torch.float32, device=device)
    ring = poisoned(1, 2, 17, 5, dtype=torch.float32, device=device)
    counters = counters_at(0, device)
    commit(h_in, h_fn, h_out, p_ref, ring, counters, h_in, h_out, ring, impl=impl)
    assert torch.equal(p_ref, h_fn - h_in)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_inf_are_stored_as_they_are(integers, device, impl):
    h_in, h_fn, h_out = (integers(3, 5) for _ in range(3))
    h_fn[1, 1], h_out[2, 2] = float("nan"), float("inf")
    p_ref, ring = torch.zeros_like(h_in), torch.zeros_like(h_in)[None]
    commit(h_in, h_fn, h_out, p_ref, ring, counters_at(0, device), impl=impl)
    torch.testing.assert_close(p_ref, h_fn - h_in, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(ring[0], h_out - h_fn, equal_nan=True, rtol=0, atol=0)


def test_inputs_may_require_grad(random, device):
    h_in, h_fn, h_out = (random(3, 5).requires_grad_() for _ in range(3))
    for impl in IMPLS:
        p_ref, ring = torch.empty(3, 5, device=device), torch.empty(1, 3, 5, device=device)
        commit(h_in, h_fn, h_out, p_ref, ring, counters_at(0, device), impl=impl)
        assert not p_ref.requires_grad
        assert not ring.requires_grad


def test_rejects_what_does_not_fit():
    x, ring, counters = torch.zeros(2, 3), torch.zeros(1, 2, 3), counters_at(0, "cpu")
    with pytest.raises(ValueError, match=r"must share a shape, got .*\(3,\)"):
        commit(x, x, x, torch.zeros(3), ring, counters)
    with pytest.raises(ValueError, match=r"h_in must come with p_ref, got \(2, 3\) and None"):
        commit(x, x, x, None, ring, counters)
    with pytest.raises(ValueError, match=r"share a dtype .* got .*float16"):
        commit(x, x.half(), x, x, ring, counters)
    with pytest.raises(ValueError, match=r"p_ref must be contiguous, got \(1, 2\)"):
        commit(x, x, x, torch.zeros(3, 2).T, ring, counters)
    with pytest.raises(ValueError, match=rf"counters must be int32 \({ls.NUM_COUNTERS},\) on"):
        commit(x, x, x, x, ring, counters.long())
    with pytest.raises(ValueError, match=r"ring of h_out must be .* got \(2, 3\) and \(2, 3\)"):
        commit(x, x, x, x, x, counters)
    with pytest.raises(ValueError, match="encoder_fn must come with its output and ring"):
        commit(x, x, x, x, ring, counters, x)
    with pytest.raises(ValueError, match="encoder_fn and encoder_out must share a shape"):
        commit(x, x, x, x, ring, counters, x, x[:1], ring)
    with pytest.raises(ValueError, match="ring of encoder_out must be"):
        commit(x, x, x, x, ring, counters, x, x, x)
    with pytest.raises(ValueError, match="share the slots"):
        commit(x, x, x, x, ring, counters, x, x, torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match=r"counters must be .* on cpu, got .* meta"):
        commit(x, x, x, x, ring, counters.to("meta"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("with_p_ref", [True, False])
def test_the_op_is_registered_as_it_behaves(random, device, with_p_ref, encoder, impl):
    stream = [random(2, 3, 5) for _ in range(4)]
    if not with_p_ref:
        stream[0] = stream[3] = None
    second = (random(2, 7), random(2, 7), random(2, 2, 7)) if encoder else (None,) * 3
    op = torch.ops.dbcache.commit.default
    (h_in, h_fn, h_out, p_ref), (*encoder, encoder_ring) = stream, second
    ring = (random(2, 2, 3, 5), counters_at(1, device), p_ref, encoder_ring)
    moving = [h_fn, h_out, h_in, *encoder]
    torch.library.opcheck(op, (moving, *ring, None, None, False, impl))
