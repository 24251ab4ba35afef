import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.distributed import merge_attention as module
from dbcache.kernels.distributed.merge_attention import merge_attention
from dbcache.testing import assert_as_accurate, poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMPLS = ["triton", "reference"]
INF = math.inf
# one head, rows short of a program and past it, and the head dimensions of real models
SHAPES = [(1, 1, 1, 1), (2, 17, 3, 5), (1, 5, 2, 40), (3, 4, 1, 72), (1, 9, 2, 80), (5, 3, 3, 128)]


@pytest.fixture
def poisoned_memory():
    """Fill what torch.empty returns: NaN for floats, 255 for bytes."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def merged(out_a, lse_a, out_b, lse_b):
    """Return the merge in float64, from shares of the partials and by another formula."""
    share = torch.sigmoid(lse_b.double() - lse_a.double()).unsqueeze(-1)
    out = out_a.double() + share * (out_b.double() - out_a.double())
    return out, torch.stack((lse_a, lse_b)).double().logsumexp(0)


def attention(q, k, v):
    """Return output and log-sum-exp of attention over (B, S, H, D), in float64."""
    scores = torch.einsum("bshd,bthd->bsht", q.double(), k.double()) / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1)
    return torch.einsum("bsht,bthd->bshd", (scores - lse.unsqueeze(-1)).exp(), v.double()), lse


def partials(random, *shape, dtype=torch.float32):
    outs = [random(*shape, dtype=dtype) for _ in "ab"]
    lses = [3 * random(*shape[:3]) for _ in "ab"]
    return outs[0], lses[0], outs[1], lses[1]


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_accurate_as_plain_torch(random, shape, dtype, impl):
    args = partials(random, *shape, dtype=dtype)
    out, lse = merge_attention(*args, impl=impl)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert lse.is_contiguous()
    exact, exact_lse = merged(*args)
    out_a, lse_a, out_b, lse_b = args
    share = torch.sigmoid(lse_b - lse_a).unsqueeze(-1).to(dtype)
    assert_as_accurate(out, out_a + share * (out_b - out_a), exact)
    assert_as_accurate(lse, torch.logaddexp(lse_a, lse_b), exact_lse)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("parts", [(4, 5), (1, 3, 5), (2, 2, 2, 3)], ids=str)
def test_partial_attentions_add_up_to_attention_over_all_keys(random, parts, impl):
    q, k, v = random(2, 3, 2, 40), random(2, 9, 2, 40), random(2, 9, 2, 40)
    assert sum(parts) == 9
    out, lse = None, None
    for keys, values in zip(k.split(parts, 1), v.split(parts, 1), strict=True):
        part, part_lse = attention(q, keys, values)
        part, part_lse = part.float(), part_lse.float()
        out, lse = (
            (part, part_lse)
            if out is None
            else merge_attention(out, lse, part, part_lse, impl=impl)
        )
    exact, exact_lse = attention(q, k, v)
    assert (out - exact).abs().max() < 2e-6
    assert (lse - exact_lse).abs().max() < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_the_running_output_may_stay_float32(random, low, impl):
    out_a, lse_a, out_b, lse_b = partials(random, 1, 4, 2, 40, dtype=low)
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b, out_dtype=torch.float32, impl=impl)
    assert out.dtype == torch.float32
    assert (out - merged(out_a, lse_a, out_b, lse_b)[0]).abs().max() < 2e-6
    # and is merged with the next one, which is not
    again, _ = merge_attention(out, lse, out_b, lse_a, impl=impl)
    assert again.dtype == torch.float32
    assert (again - merged(out, lse, out_b, lse_a)[0]).abs().max() < 2e-6
    last, _ = merge_attention(out, lse, out_b, lse_a, out_dtype=low, impl=impl)
    assert last.dtype == low


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("swap", [False, True], ids=["a", "b"])
def test_a_partial_without_keys_may_hold_anything_and_leaves_the_other_as_it_is(
    random, device, swap, impl
):
    out, lse = random(2, 3, 2, 5), random(2, 3, 2)
    nothing = poisoned(2, 3, 2, 5, dtype=torch.float32, device=device)
    empty = torch.full_like(lse, -INF)
    pairs = ((nothing, empty), (out, lse)) if swap else ((out, lse), (nothing, empty))
    got, got_lse = merge_attention(*pairs[0], *pairs[1], impl=impl)
    assert torch.equal(got, out)
    assert torch.equal(got_lse, lse)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_any_key_are_zero_and_do_not_touch_others(random, device, impl):
    args = partials(random, 1, 3, 2, 5)
    expected, expected_lse = merge_attention(*args, impl=impl)
    out_a, lse_a, out_b, lse_b = args
    for x in (lse_a, lse_b):
        x[0, 1, 1] = -INF
    for x in (out_a, out_b):
        x[0, 1, 1] = math.nan
    out, lse = merge_attention(*args, impl=impl)
    expected[0, 1, 1], expected_lse[0, 1, 1] = 0, -INF
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("position", [1, 3], ids=["lse_a", "lse_b"])
@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("other", [0.5, -INF, math.nan])
def test_a_bad_lse_makes_its_row_nan_and_no_other(random, position, value, other, impl):
    args = partials(random, 1, 3, 2, 5)
    args[position][0, 2, 1] = value
    args[4 - position][0, 2, 1] = other
    out, lse = merge_attention(*args, impl=impl)
    assert out[0, 2, 1].isnan().all()
    assert lse[0, 2, 1].isnan()
    assert out.isnan().sum() == 5
    assert lse.isnan().sum() == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gap", [20.0, 200.0, 1e4, 1e30])
def test_lse_far_apart_or_large_do_not_overflow(random, gap, impl):
    out_a, lse_a, out_b, lse_b = partials(random, 1, 3, 2, 5)
    for a, b in ((lse_a + gap, lse_b), (lse_a, lse_b - gap), (lse_a + gap, lse_b + gap)):
        out, lse = merge_attention(out_a, a, out_b, b, impl=impl)
        exact, exact_lse = merged(out_a, a, out_b, b)
        assert (out - exact).abs().max() < 2e-6
        assert ((lse - exact_lse) / exact_lse).abs().max() < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_honours_strides_and_leaves_its_inputs_alone(random, impl):
    out_a = random(2, 3, 17, 5).transpose(1, 2)  # (B, H, S, D) in memory
    out_b = random(2, 17, 3, 7)[..., 1:6]
    lse_a, lse_b = random(2, 3, 17).transpose(1, 2), random(1, 17, 6)[..., ::2].expand(2, 17, 3)
    args = out_a, lse_a, out_b, lse_b
    before = [x.clone() for x in args]
    out, lse = merge_attention(*args, impl=impl)
    expected, expected_lse = merge_attention(*[x.contiguous() for x in args], impl=impl)
    torch.testing.assert_close(out, expected)  # exp may take another path for other strides
    torch.testing.assert_close(lse, expected_lse)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))
    d_first = [x.movedim(3, 0).contiguous().movedim(0, 3) for x in (out_a, out_b)]
    out, _ = merge_attention(d_first[0], lse_a, d_first[1], lse_b, impl=impl)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("shape", [(0, 3, 2, 5), (2, 0, 2, 5), (2, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_empty_tensors_are_allowed(random, shape, impl):
    out, lse = merge_attention(*partials(random, *shape), impl=impl)
    assert out.shape == shape
    assert lse.shape == shape[:3]


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 9, 4, 33))),
    empty=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_triton_and_the_reference_agree_for_any_shape(shape, empty, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    args = [torch.randn(n, generator=generator) for n in (shape, shape[:3]) * 2]
    for lse, some_empty in zip(args[1::2], empty, strict=True):
        if some_empty:
            lse.masked_fill_(torch.rand(lse.shape, generator=generator) < 0.3, -INF)
    args = [x.to(device) for x in args]
    out, lse = merge_attention(*args, impl="triton")
    expected, expected_lse = merge_attention(*args, impl="reference")
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-6, atol=2e-6)


def test_every_element_of_the_results_is_written(random, poisoned_memory):
    args = partials(random, 2, 17, 3, 40)
    assert torch.empty(1).isnan()
    for got, expected in zip(merge_attention(*args, impl="triton"), merged(*args), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)


def test_one_launch_merges(random, monkeypatch):
    launches = []
    kernel = module._merge_attention_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_merge_attention_kernel", Counted())
    merge_attention(*partials(random, 2, 100, 3, 40), impl="triton")
    assert launches == [(math.ceil(300 / 32), 2)]


def test_inputs_may_require_grad_and_the_result_does_not(random):
    args = [x.requires_grad_() for x in partials(random, 1, 2, 2, 5)]
    for impl in IMPLS:
        assert not any(x.requires_grad for x in merge_attention(*args, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_in_one_compiled_graph(random, impl):
    args = partials(random, 2, 5, 2, 5)
    torch.compiler.reset()
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    expected = merge_attention(*args, impl=impl)
    for got, same in zip(compiled(*args, impl=impl), expected, strict=True):
        assert torch.equal(got, same)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_may_be_symbols(random, impl):
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 7, 30):
        args = partials(random, 2, tokens, 2, 5)
        expected = merge_attention(*args, impl=impl)
        for got, same in zip(compiled(*args, impl=impl), expected, strict=True):
            assert torch.equal(got, same)


def test_offsets_may_pass_2_to_the_31(device):
    """Between the tokens lies memory that nobody touches."""
    memory = torch.empty(2**31 + 10, dtype=torch.bfloat16, device=device)
    out_a = memory.as_strided((1, 3, 2, 5), (0, 2**30, 5, 1))
    out_a.copy_(torch.arange(30).view(1, 3, 2, 5))
    lse = torch.zeros(1, 3, 2, device=device)
    out, _ = merge_attention(out_a, lse, out_a.contiguous() + 2, lse, impl="triton")
    assert torch.equal(out, out_a + 1)


def test_rejects_what_does_not_fit():
    out, lse = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"share a shape .* got \(2, 3, 4, 5\) and \(2, 3, 4, 4\)"):
        merge_attention(out, lse, out[..., :4], lse)
    with pytest.raises(ValueError, match="share a shape"):
        merge_attention(out[0], lse[0], out[0], lse[0])
    with pytest.raises(ValueError, match="with D >= 1"):
        merge_attention(out[..., :0], lse, out[..., :0], lse)
    with pytest.raises(ValueError, match=r"lse_b must be .* \(2, 3, 4\), got .* \(2, 4, 3\)"):
        merge_attention(out, lse, out, lse.mT)
    with pytest.raises(ValueError, match=r"lse_b must be float32 .* got torch.float64"):
        merge_attention(out, lse, out, lse.double())
    with pytest.raises(ValueError, match=r"dtype of .* got .*float64"):
        merge_attention(out, lse, out, lse, out_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dtype of .* got .*float64"):
        merge_attention(out, lse, out.double(), lse)
    with pytest.raises(ValueError, match="one device, got cpu and meta and cpu and cpu"):
        merge_attention(out, lse.to("meta"), out, lse)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_op_is_registered_as_it_behaves(random, impl):
    args = partials(random, 1, 2, 2, 5)
    op = torch.ops.dbcache.merge_attention.default
    torch.library.opcheck(op, (*args, torch.bfloat16, impl))
