import pytest
import torch

from dbcache.kernels.common.sums import MAX_PARTIALS, tree_sum
from dbcache.kernels.decision import probe_diff as module
from dbcache.kernels.decision.probe_diff import probe_diff, probe_diff_reference
from dbcache.testing import assert_as_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    (1, 1),
    (2,),
    (3, 17, 5),
    (1, 17, 96),
    (2, 1, 96),
    (1, module.BLOCK - 1),
    (2, module.BLOCK),
    (1, module.BLOCK + 1),
    (2, 3, 5, 7, 11),
]


def sums(h_in, h_fn, p_ref):
    """Return the sums in float64, of P rounded to the dtype of p_ref."""
    p = (h_fn.double() - h_in.double()).to(p_ref.dtype).double()
    num, den = (p - p_ref.double()).abs(), p_ref.double().abs()
    return torch.stack([x.reshape(len(x), -1).sum(1) for x in (num, den)], 1)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_sums_of_integers_are_exact(integers, shape, dtype, impl):
    h_in, h_fn, p_ref = (integers(*shape, dtype=dtype) for _ in range(3))
    partials = probe_diff(h_in, h_fn, p_ref, impl=impl)
    assert partials.dtype == torch.float32
    assert partials.shape[0] == shape[0]
    assert partials.shape[2] == 2
    assert torch.equal(partials.double().sum(1), sums(h_in, h_fn, p_ref))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_plain_torch(random, dtype):
    h_in, h_fn, p_ref = (random(3, 17, 96, dtype=dtype) for _ in range(3))
    exact = sums(h_in, h_fn, p_ref)
    plain = torch.sub(h_fn, h_in).sub(p_ref)  # in dtype, every step rounded
    plain = torch.stack([x.abs().flatten(1).sum(1) for x in (plain, p_ref)], 1)
    for impl in ("triton", "reference"):
        partials = probe_diff(h_in, h_fn, p_ref, impl=impl).sum(1)
        # Triton's interpreter truncates to bfloat16 where GPUs round
        truncated = dtype == torch.bfloat16 and impl == "triton" and not h_in.is_cuda
        assert_as_accurate(partials, plain, exact, tiny=2.0**-8 if truncated else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_input_differs_by_exactly_nothing(random, dtype):
    h_in, h_fn = random(2, 17, 96, dtype=dtype), random(2, 17, 96, dtype=dtype)
    if dtype == torch.bfloat16 and not h_in.is_cuda:  # the interpreter truncates
        h_in, h_fn = h_in.round(), h_fn.round()
    p_ref = (h_fn.float() - h_in.float()).to(dtype)
    for impl in ("triton", "reference"):
        partials = probe_diff(h_in, h_fn, p_ref, impl=impl)
        assert partials[..., 0].abs().max() == 0
        assert partials[..., 1].min() > 0


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_p_is_rounded_to_the_dtype_of_p_ref(random, impl):
    h_in, h_fn = random(2, 9, 5), random(2, 9, 5)
    p_ref = (h_fn - h_in).half()
    assert probe_diff(h_in, h_fn, p_ref, impl=impl)[..., 0].abs().max() == 0
    h_in, h_fn = h_in.bfloat16(), h_fn.bfloat16()
    p_ref = h_fn.float() - h_in.float()
    assert probe_diff(h_in, h_fn, p_ref, impl=impl)[..., 0].abs().max() == 0


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_honours_strides(integers, impl):
    h_in = integers(5, 17, 3).permute(2, 1, 0)
    h_fn = integers(3, 17, 10)[..., ::2]
    p_ref = integers(1, 1, 5).expand(3, 17, 5)
    partials = probe_diff(h_in, h_fn, p_ref, impl=impl)
    assert torch.equal(partials.double().sum(1), sums(h_in, h_fn, p_ref))


def test_honours_a_storage_offset_that_is_not_aligned(integers):
    flat = integers(3 * 2 * 96 + 1)[1:]
    h_in, h_fn, p_ref = flat.view(3, 2, 96)
    partials = probe_diff(h_in, h_fn, p_ref, impl="triton")
    assert torch.equal(partials.double().sum(1), sums(h_in, h_fn, p_ref))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_sum_of_their_sample_only(integers, impl, value):
    h_in, h_fn, p_ref = (integers(2, 3, 96) for _ in range(3))
    h_fn[1, 2, 95] = value
    num, den = probe_diff(h_in, h_fn, p_ref, impl=impl).sum(1).unbind(1)
    assert torch.equal(num[1].isnan(), torch.tensor(value != value, device=num.device))
    assert not num[1].isfinite()
    assert num[0].isfinite()
    assert den.isfinite().all()


def testpartitions_large_inputs_by_shape_and_within_what_decide_adds_up(integers, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr("dbcache.kernels.common.sums.BLOCK", 16)
    monkeypatch.setattr("dbcache.kernels.common.sums.MAX_PARTIALS", 4)
    h_in, h_fn, p_ref = (integers(2, 150) for _ in range(3))  # 10 blocks: 3 per program
    partials = probe_diff(h_in, h_fn, p_ref, impl="triton")
    assert partials.shape == (2, 4, 2)
    chunks = [sums(*(x[:, i : i + 48] for x in (h_in, h_fn, p_ref))) for i in range(0, 150, 48)]
    assert torch.equal(partials.double(), torch.stack(chunks, 1))


@pytest.mark.parametrize("numel", [1, 2048, 2049, 2**21, 2**21 + 1, 10**7, 2**33 + 5])
def test_thepartition_covers_everything_once(numel):
    per_program, programs = module.partition(torch.Size((1, numel)), False)
    assert 1 <= programs <= MAX_PARTIALS
    covered = per_program * programs * module.BLOCK
    assert covered >= numel
    assert covered - per_program * module.BLOCK < numel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_without_h_in_hidden_states_are_compared(integers, dtype, impl):
    h_fn, p_ref = integers(3, 17, 96, dtype=dtype), integers(3, 17, 96, dtype=dtype)
    partials = probe_diff(None, h_fn, p_ref, impl=impl)
    assert torch.equal(partials.double().sum(1), sums(torch.zeros_like(h_fn), h_fn, p_ref))
    assert probe_diff(None, h_fn, h_fn, impl=impl)[..., 0].abs().max() == 0
    narrow = h_fn.to(torch.float16)
    assert probe_diff(None, h_fn, narrow, impl=impl)[..., 0].abs().max() == 0


def thresholds(device, important):
    """Return the thresholds of a lane whose important tokens changed more than `important`."""
    return torch.tensor([0.0, 0.0, important], device=device)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 96), (2, 5, 7, 11), (1, 3, 5000)], ids=str)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_important_tokens_are_summed_apart(integers, device, shape, dtype, impl):
    h_in, h_fn, p_ref = (integers(*shape, dtype=dtype) for _ in range(3))
    changed = torch.arange(shape[1], device=device) % 3 == 1
    moved = changed.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    h_fn = torch.where(moved, h_in + p_ref + 16, h_in + p_ref)
    partials = probe_diff(h_in, h_fn, p_ref, thresholds(device, 1.5), impl=impl)
    assert partials.shape[2] == 4
    some = sums(h_in * moved, h_fn * moved, p_ref * moved)
    exact = torch.cat((sums(h_in, h_fn, p_ref), some), 1)
    assert torch.equal(partials.double().sum(1), exact)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_tokens_that_are_nan_or_had_no_residual_are_important(integers, device, impl):
    h_in, p_ref = integers(1, 4, 6), integers(1, 4, 6)
    p_ref[:, 1:3] = 0
    h_fn = h_in + p_ref
    h_fn[0, 2, 0] += 3  # token 1 is still all zeros, token 2 is not
    *_, num, den = probe_diff(h_in, h_fn, p_ref, thresholds(device, 9.0), impl=impl).sum((0, 1))
    assert (num, den) == (3, 0)
    h_fn[0, 3, 5] = float("nan")
    assert probe_diff(h_in, h_fn, p_ref, thresholds(device, 9.0), impl=impl).sum((0, 1))[2].isnan()


def test_tokens_are_spread_over_what_decide_adds_up(integers, device, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr("dbcache.kernels.common.sums.BLOCK", 16)
    monkeypatch.setattr("dbcache.kernels.common.sums.MAX_PARTIALS", 4)
    h_in, h_fn, p_ref = (integers(2, 10, 37) for _ in range(3))  # 3 tokens per program
    partials = probe_diff(h_in, h_fn, p_ref, thresholds(device, 0.0), impl="triton")
    assert partials.shape == (2, 4, 4)
    chunks = [sums(*(x[:, i : i + 3] for x in (h_in, h_fn, p_ref))) for i in range(0, 10, 3)]
    assert torch.equal(partials[..., :2].double(), torch.stack(chunks, 1))


def test_the_bits_are_those_of_the_documented_order(random, monkeypatch):
    """Lanes add up their elements block by block, then neighbours are added: nothing is left open.

    So neither the GPU nor the number of warps nor the order of the programs can change a bit.
    """
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr("dbcache.kernels.common.sums.BLOCK", 16)
    monkeypatch.setattr("dbcache.kernels.common.sums.MAX_PARTIALS", 4)
    h_in, h_fn, p_ref = (random(2, 150).exp() for _ in range(3))  # 10 blocks: 3 per program
    partials = probe_diff(h_in, h_fn, p_ref, impl="triton").cpu()
    num, den = (h_fn - h_in - p_ref).abs().cpu(), p_ref.abs().cpu()
    for sample in range(2):
        for program in range(4):
            for entry, x in enumerate((num, den)):
                padded = torch.nn.functional.pad(x[sample], (0, 42)).view(4, 3, 16)[program]
                lanes = (padded[0] + padded[1]) + padded[2]
                assert partials[sample, program, entry].item() == tree_sum(lanes.tolist())


def test_inputs_may_require_grad_and_the_result_does_not(random):
    h_in, h_fn, p_ref = (random(1, 3, 5).requires_grad_() for _ in range(3))
    for impl in ("triton", "reference"):
        assert not probe_diff(h_in, h_fn, p_ref, impl=impl).requires_grad


def test_rejects_what_does_not_fit():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"share a shape, got \(2, 3\) and \(2, 3\) and \(3,\)"):
        probe_diff(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"tokens need a shape \(B, ..., width\), got \(2, 3\)"):
        probe_diff(x, x, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"h_fn must be \(B, ...\) with B >= 1, got \(0, 3\)"):
        probe_diff(x[:0], x[:0], x[:0])
    with pytest.raises(ValueError, match=r"share a dtype .*got torch.float32 and torch.float16"):
        probe_diff(x, x.half(), x)
    with pytest.raises(ValueError, match=r"dtype.* got .*float64"):
        probe_diff(x, x, x.double())
    with pytest.raises(ValueError, match=r"probe_diff: h_fn must have a dtype .* got .*float64"):
        probe_diff(None, x.double(), x.double())
    with pytest.raises(ValueError, match="one device, got cpu and cpu and meta"):
        probe_diff(x, x, x.to("meta"))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_op_is_registered_as_it_behaves(random, hidden, impl):
    args = (None if hidden else random(2, 3, 5), random(2, 3, 5), random(2, 3, 5), None)
    torch.library.opcheck(torch.ops.dbcache.probe_diff.default, (*args, impl))
    assert probe_diff_reference(*args).shape == (2, 1, 2)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_the_op_is_registered_as_it_behaves_with_tokens(random, device, impl):
    args = (*(random(2, 3, 5) for _ in range(3)), thresholds(device, 0.5))
    torch.library.opcheck(torch.ops.dbcache.probe_diff.default, (*args, impl))
    assert probe_diff_reference(*args).shape == (2, 1, 4)
