"""The ops at the token counts and widths of models, on any shape, and past 2**31 elements."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common import launches, sums
from dbcache.kernels.decision import probe_diff as probe_module
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.prediction.commit import Stream as CommitStream
from dbcache.kernels.prediction.commit import commit, commit_block
from dbcache.kernels.prediction.predict import Stream as PredictStream
from dbcache.kernels.prediction.predict import predict, predict_block
from dbcache.testing import assert_as_accurate, poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [(5, 1, 96), (4, 17, 96), (1, 4097, 96), (2, 1, 3072), (3, 17, 3072), (1, 17, 5120)]
"""(batch, tokens, width)"""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def strided(x, form):
    """Return `x` in memory that is laid out as `form` says."""
    if form == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if form == "every other":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2]
    return x


def counters_at(slot):
    counters = torch.zeros(ls.NUM_COUNTERS, dtype=torch.int32, device=DEVICE)
    counters[ls.SLOT] = slot
    return counters


def check_all(inputs, dtype, form="contiguous"):
    """Compare a measurement, a commit and a prediction with float64 and plain PyTorch."""
    h_in, h_fn, h_out, p_ref = (strided(x, form) for x in inputs)
    shape = h_fn.shape
    # bfloat16 sums: the interpreter cuts off where a GPU rounds
    tiny = 2.0**-8 if dtype == torch.bfloat16 and not h_in.is_cuda else 1e-6
    exact = (h_fn.double() - h_in.double() - p_ref.double()).abs().flatten(1).sum(1)
    plain = torch.sub(h_fn, h_in).sub(p_ref).abs().flatten(1).sum(1)
    sums = probe_diff(h_in, h_fn, p_ref, impl="triton").sum(1)
    assert_as_accurate(sums[:, 0], plain, exact, tiny=tiny)

    stored = poisoned(*shape, dtype=dtype, device=DEVICE)
    ring = poisoned(3, *shape, dtype=dtype, device=DEVICE)
    commit(h_in, h_fn, h_out, stored, ring, counters_at(1), impl="triton")
    assert_as_accurate(stored, h_fn - h_in, h_fn.double() - h_in.double(), tiny=tiny)
    assert_as_accurate(ring[1], h_out - h_fn, h_out.double() - h_fn.double(), tiny=tiny)
    assert ring[[0, 2]].isnan().all()

    weights = torch.tensor([0, 1.5, 0] + [float("nan")] * 5, device=DEVICE)
    out, _ = predict(h_fn, ring, weights, impl="triton")
    plain = h_fn + ring[1] * torch.tensor(1.5, dtype=dtype)
    assert_as_accurate(out, plain, h_fn.double() + 1.5 * ring[1].double(), tiny=tiny)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_of_models(random, size, dtype):
    check_all([random(*size, dtype=dtype) for _ in range(4)], dtype)


@pytest.mark.parametrize("form", ["transposed", "every other"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_models_in_any_layout(random, form, dtype):
    check_all([random(2, 17, 3072, dtype=dtype) for _ in range(4)], dtype, form)


@given(
    shape=st.lists(st.integers(1, 13), min_size=2, max_size=3),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_any_shape(shape, dtype, scale):
    generator = torch.Generator().manual_seed(sum(shape))
    inputs = [torch.randn(*shape, generator=generator) * scale for _ in range(4)]
    check_all([x.to(DEVICE, dtype) for x in inputs], dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(random, value):
    h_in, h_fn, h_out = (random(2, 17, 96) for _ in range(3))
    h_out[1, 3, 5] = value
    stored, ring = torch.empty_like(h_in), poisoned(1, 2, 17, 96, dtype=h_in.dtype, device=DEVICE)
    commit(h_in, h_fn, h_out, stored, ring, counters_at(0), impl="triton")
    assert stored.isfinite().all()
    out, _ = predict(h_fn, ring, torch.tensor([1.0] + [0.0] * 7, device=DEVICE), impl="triton")
    bad = torch.zeros_like(out, dtype=torch.bool)
    bad[1, 3, 5] = True
    for x in (ring[0], out):
        assert torch.equal(~x.isfinite(), bad)


SIZE = 2**31 + 4099
"""Elements that 32-bit offsets do not reach. Pages that are not touched cost nothing."""


@triton.jit
def _commit_last(x_ptr, p_ref_ptr, ring_ptr, slot, size, block, BLOCK: tl.constexpr):
    stream = CommitStream(x_ptr, x_ptr, x_ptr, p_ref_ptr, ring_ptr)
    commit_block(stream, slot, size, block, False, BLOCK)


@triton.jit
def _predict_last(
    h_ptr, ring_ptr, weights_ptr, out_ptr, size, block, K: tl.constexpr, BLOCK: tl.constexpr
):
    stream = PredictStream(h_ptr, ring_ptr, weights_ptr, out_ptr)
    predict_block(stream, size, block, K, False, BLOCK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_graph.py runs whole tensors on a GPU")
class TestPast32Bits:
    """Only the last block runs: the offsets are those of the whole tensor, the work is not."""

    def memory(self, size):
        return torch.empty(size, dtype=torch.float16)

    def test_commit(self):
        block_size = launches.BLOCK
        block = (SIZE - 1) // block_size
        x, ring = self.memory(SIZE), self.memory(2 * SIZE)
        x[-3:] = torch.tensor([1.0, 2.0, 3.0])
        ring[-3:] = 7
        slot = torch.tensor(1).item()
        _commit_last[(1,)](x, x, ring, slot, SIZE, block, BLOCK=block_size)
        assert x[-3:].tolist() == [0, 0, 0]  # h_fn - h_in, in place of both
        assert ring[-3:].tolist() == [0, 0, 0]

    # the second: a size that fits into 32 bits, and a slot that begins beyond them
    @pytest.mark.parametrize(("size", "slots"), [(SIZE, 2), (2**30 + 3, 3)])
    def test_predict(self, size, slots):
        block_size = launches.BLOCK
        block = (size - 1) // block_size
        h, ring = self.memory(size), self.memory(slots * size)
        h[-3:] = torch.tensor([1.0, 2.0, 3.0])
        ring[-3:] = torch.tensor([4.0, 5.0, 6.0])
        weights = torch.zeros(8)
        weights[slots - 1] = 10
        _predict_last[(1,)](h, ring, weights, h, size, block, K=slots, BLOCK=block_size)
        assert h[-3:].tolist() == [41, 52, 63]

    def test_probe_diff(self):
        size = 2**30 + 2**11
        h, p_ref = self.memory(3 * size), self.memory(3 * size)
        for sample in range(3):
            block = slice(sample * size, sample * size + launches.BLOCK)
            h[block] = sample
            p_ref[block] = 1
        partials = torch.empty(3, 1, 2)
        probe_module._probe_diff_kernel[(1, 3)](
            None, h, p_ref, partials, size, 1, None, size,
            LOG_BLOCK=sums.log2(launches.BLOCK),
        )  # fmt: skip
        expected = [[abs(sample - 1.0), 1.0] for sample in range(3)]
        assert (partials[:, 0] / launches.BLOCK).tolist() == expected
