import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.distributed import fp8_pack as module
from dbcache.kernels.distributed.fp8_pack import fp8_pack, fp8_unpack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMPLS = ["triton", "reference"]
SPLITS = ["heads", "sequence"]
WORLDS = [1, 2, 4]
WIDTHS = [1, 5, 40, 72, 128]
FORMS = [True, False]
OTHER = {"heads": "sequence", "sequence": "heads"}


@pytest.fixture
def poisoned_memory():
    """Fill what torch.empty returns: NaN for floats, 255 for bytes."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def parts(x, world, split):
    """Return the parts of x by rank, each contiguous, cut by hand."""
    dim = {"heads": 2, "sequence": 1}[split]
    return [part.contiguous() for part in x.chunk(world, dim)]


def sections(chunk, shape):
    """Return codes and scales of one rank's bytes, found by hand."""
    rows, width = math.prod(shape[:3]), shape[3]
    start = -(-rows * width // 16) * 16
    codes, scales = chunk[: rows * width], chunk[start : start + 4 * rows]
    return codes.view(shape), scales.clone().view(torch.float32).view(shape[:3])


def round_trip(x, impl="reference", **options):
    """Return what x is after quantisation, in float32, by way of one rank."""
    buffer = fp8_pack(x, world=1, scatter="heads", impl=impl)
    return fp8_unpack(buffer, x.shape, gather="sequence", impl=impl, **options)


def exchange(buffers):
    """Return what each rank receives in an all-to-all of these buffers."""
    return [torch.stack(chunks) for chunks in zip(*buffers, strict=True)]


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_chunk_has_the_codes_and_scales_of_its_rank(random, width, world, split, dtype, impl):
    x = random(2, 4, 8, width, dtype=dtype)
    buffer = fp8_pack(x, world=world, scatter=split, impl=impl)
    assert buffer.dtype == torch.uint8
    assert buffer.is_contiguous()
    for chunk, part in zip(buffer, parts(x, world, split), strict=True):
        assert len(chunk) % 16 == 0
        codes, scales = sections(chunk, part.shape)
        exact = part.double().abs().amax(-1) / 448
        assert ((scales - exact).abs() <= exact * 2**-22).all()
        scaled = part.float() * (1 / scales)[..., None]
        assert torch.equal(codes, scaled.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.covering
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (3, 4, 12, 40), (2, 8, 4, 33)], ids=str)
def test_triton_and_the_reference_write_the_same_bytes(random, shape, dtype, split):
    x = random(*shape, dtype=dtype) * 10 ** random(*shape[:3], 1).to(dtype)
    for quantize in FORMS:
        packed = [fp8_pack(x, world=4, scatter=split, quantize=quantize, impl=i) for i in IMPLS]
        assert torch.equal(*packed)
        for gather in SPLITS:
            out = [fp8_unpack(packed[0], shape, gather=gather, impl=i) for i in IMPLS]
            close = {"rtol": 2**-7, "atol": 0.0} if out[0].dtype == torch.bfloat16 else {}
            # Triton's interpreter truncates to bfloat16 where GPUs round
            torch.testing.assert_close(*out, **(close if not x.is_cuda else {}))
            out = [
                fp8_unpack(packed[0], shape, gather=gather, dtype=torch.float32, impl=i)
                for i in IMPLS
            ]
            assert torch.equal(*out)


@pytest.mark.parametrize("impl", IMPLS)
def test_codes_are_the_nearest_and_even_on_ties(device, impl):
    codes = torch.arange(127, dtype=torch.uint8)
    exact = codes.view(torch.float8_e4m3fn).float()
    middle = (exact[:-1] + exact[1:]) / 2
    below, above = (middle.nextafter(torch.tensor(sign * math.inf)) for sign in (-1, 1))
    values = torch.cat((exact, middle, below, above))
    tie = codes[:-1] + codes[:-1] % 2
    expected = torch.cat((codes, tie, codes[:-1], codes[1:]))
    # a row whose largest is 448 has a scale of exactly 1
    x = torch.stack((values, -values))[None, None].to(device)
    got, scales = sections(fp8_pack(x, world=1, scatter="heads", impl=impl)[0], x.shape)
    assert scales.unique().tolist() == [1.0]
    assert torch.equal(got[0, 0, 0].cpu(), expected)
    assert torch.equal(got[0, 0, 1].cpu(), expected + 128)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 100.0])
def test_the_error_is_within_the_format(random, dtype, magnitude, impl):
    x = (random(2, 17, 4, 40) ** 3 * magnitude).to(dtype)
    error = (round_trip(x, impl, dtype=torch.float32).double() - x.double()).abs()
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    bound = torch.maximum(x.double().abs() / 16, scale / 1024) * (1 + 2**-20)
    assert (error <= bound).all()
    assert error.max() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1e-30, 1e38, 3.4e38])
def test_zeros_and_extreme_rows_stay_finite(random, largest, impl):
    x = random(1, 3, 2, 8)
    x[0, 1] *= largest / x[0, 1].abs().amax(-1, keepdim=True)
    out = round_trip(x, impl, dtype=torch.float32)
    assert out.isfinite().all()
    assert out[0, 1].abs().max() <= largest * (1 + 2**-4)
    if largest >= 1e-30:
        assert (out[0, 1] - x[0, 1]).abs().max() <= largest / 16
    assert torch.equal(out[0, ::2], round_trip(x[:, ::2].contiguous(), impl, dtype=out.dtype)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_nan_and_touches_nothing_else(random, value, impl):
    x = random(1, 3, 4, 40)
    x[0, 1, 3, 39] = 0
    expected = fp8_pack(x, world=2, scatter="heads", impl=impl)
    x[0, 1, 3, 39] = value
    buffer = fp8_pack(x, world=2, scatter="heads", impl=impl)
    codes, _ = sections(buffer[1], (1, 3, 2, 40))
    assert codes[0, 1, 1, 39] & 0x7F == 0x7F
    assert (buffer != expected).sum() == 1
    out = fp8_unpack(buffer, (1, 6, 2, 40), gather="sequence", impl=impl)
    assert out.isnan().nonzero().tolist() == [[0, 4, 1, 39]]


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("world", WORLDS)
def test_without_quantisation_only_the_layout_changes(random, world, split, dtype, impl):
    x = random(2, 4, 8, 5, dtype=dtype)
    x[0, 1, 2, 3] = math.nan
    buffer = fp8_pack(x, world=world, scatter=split, quantize=False, impl=impl)
    assert buffer.dtype == dtype
    expected = torch.stack([part.flatten() for part in parts(x, world, split)])
    assert torch.equal(buffer.nan_to_num(7), expected.nan_to_num(7))
    back = fp8_unpack(buffer, x.shape, gather=split, impl=impl)
    assert back.dtype == dtype
    assert torch.equal(back.nan_to_num(7), x.nan_to_num(7))


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("width", WIDTHS)
def test_unpacking_by_the_same_dimension_gives_the_tensor_back(random, width, split, impl):
    x = random(2, 4, 8, width)
    buffer = fp8_pack(x, world=4, scatter=split, impl=impl)
    out = fp8_unpack(buffer, x.shape, gather=split, dtype=torch.float32, impl=impl)
    assert torch.equal(out, round_trip(x, dtype=torch.float32))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("quantize", FORMS, ids=["fp8", "layout"])
@pytest.mark.parametrize("world", WORLDS)
def test_attention_between_two_exchanges_is_attention_on_one_rank(random, world, quantize, impl):
    batch, tokens, heads, width = 2, 8, 4, 40
    q, k, v = (random(batch, tokens, heads, width) for _ in range(3))

    def send(tensors, scatter):
        """Do the all-to-all of one tensor per rank; return one per rank, split the other way."""
        buffers = [
            fp8_pack(x, world=world, scatter=scatter, quantize=quantize, impl=impl) for x in tensors
        ]
        gather = OTHER[scatter]
        shape = list(tensors[0].shape)
        shape[{"heads": 2, "sequence": 1}[scatter]] //= world
        shape[{"heads": 2, "sequence": 1}[gather]] *= world
        received = exchange(buffers)
        return [fp8_unpack(x, shape, gather=gather, dtype=x_dtype, impl=impl) for x in received]

    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    x_dtype = torch.float32
    by_rank = [send(parts(x, world, "sequence"), "heads") for x in (q, k, v)]
    for got, x in zip(by_rank, (q, k, v), strict=True):
        x = round_trip(x, dtype=torch.float32) if quantize else x
        assert all(map(torch.equal, got, parts(x, world, "heads")))
    outs = [attention(*tensors) for tensors in zip(*by_rank, strict=True)]
    got = torch.cat(send(outs, "sequence"), 1)
    if quantize:
        q, k, v = (round_trip(x, dtype=torch.float32) for x in (q, k, v))
        whole = torch.cat(outs, 2)
        torch.testing.assert_close(whole, attention(q, k, v), rtol=1e-5, atol=1e-6)
        assert torch.equal(got, round_trip(whole, dtype=torch.float32))
    else:
        torch.testing.assert_close(got, attention(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_message_is_about_half_as_long_as_bfloat16(random, width):
    x = random(1, 8, 4, width, dtype=torch.bfloat16)
    packed = fp8_pack(x, world=4, scatter="heads")
    assert packed.nbytes / x.nbytes == (width + 4) / (2 * width)
    assert width < 128 or packed.nbytes <= 0.52 * x.nbytes


@pytest.mark.parametrize("impl", IMPLS)
def test_sections_are_aligned_and_the_padding_is_zero(random, poisoned_memory, impl):
    for shape, start, size in (((1, 3, 2, 5), 16, 32), ((1, 3, 2, 16), 48, 64)):
        x = random(*shape)
        buffer = fp8_pack(x, world=2, scatter="heads", impl=impl)
        assert buffer.shape == (2, size)
        assert buffer.data_ptr() % 16 == 0
        rows = 3
        assert buffer[:, rows * shape[3] : start].eq(0).all()
        assert buffer[:, start + 4 * rows :].eq(0).all()
        scales = buffer[:, start : start + 4 * rows].clone().view(torch.float32)
        expected = torch.stack([part.abs().amax(-1).flatten() for part in parts(x, 2, "heads")])
        torch.testing.assert_close(scales, expected / 448)
    assert fp8_pack(random(1, 4, 2, 8), world=2, scatter="heads", impl=impl).shape == (2, 48)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("quantize", FORMS, ids=["fp8", "layout"])
def test_every_byte_of_the_results_is_written(random, poisoned_memory, quantize, impl):
    x = random(2, 4, 4, 8)  # without padding
    assert torch.empty(1).isnan()
    assert x.new_empty(1, dtype=torch.uint8) == 255
    buffer = fp8_pack(x, world=2, scatter="heads", quantize=quantize, impl=impl)
    for chunk, part in zip(buffer, parts(x, 2, "heads"), strict=True):
        if quantize:
            codes, scales = sections(chunk, part.shape)
            torch.testing.assert_close(scales, part.abs().amax(-1) / 448)
            assert (codes & 0x7F).max() == 0x7E  # 448, the largest of a row
        else:
            assert torch.equal(chunk, part.flatten())
    out = fp8_unpack(buffer, x.shape, gather="heads", dtype=torch.float32, impl=impl)
    torch.testing.assert_close(out, x, rtol=2**-4, atol=0.01)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("quantize", FORMS, ids=["fp8", "layout"])
@pytest.mark.parametrize("split", SPLITS)
def test_honours_strides_and_leaves_its_inputs_alone(random, split, quantize, impl):
    options = {"world": 2, "scatter": split, "quantize": quantize, "impl": impl}
    for x in (
        random(2, 4, 6, 5).transpose(1, 2),
        random(2, 6, 4, 9)[..., 2:7],
        random(5, 2, 6, 4).movedim(0, 3),
        random(1, 6, 1, 5).expand(2, 6, 4, 5),
        random(1 + 2 * 6 * 4 * 5)[1:].view(2, 6, 4, 5),
    ):
        before = x.clone()
        assert torch.equal(fp8_pack(x, **options), fp8_pack(before.contiguous(), **options))
        assert torch.equal(x, before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("quantize", FORMS, ids=["fp8", "layout"])
@pytest.mark.parametrize("shape", [(0, 2, 2, 5), (1, 0, 2, 5), (1, 2, 0, 5)], ids=str)
def test_empty_tensors_are_allowed(random, shape, quantize, impl):
    x = random(*shape)
    buffer = fp8_pack(x, world=2, scatter="heads", quantize=quantize, impl=impl)
    assert buffer.shape == (2, 0)
    assert fp8_unpack(buffer, shape, gather="heads", impl=impl).shape == shape


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 5, 4, 70))),
    world=st.integers(1, 4),
    split=st.sampled_from(SPLITS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_bytes_and_round_trip_for_any_shape(shape, world, split, dtype, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, tokens, heads, width = shape
    shape = (batch, tokens * world, heads * world, width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    packed = [fp8_pack(x, world=world, scatter=split, impl=impl) for impl in IMPLS]
    assert torch.equal(*packed)
    out = fp8_unpack(packed[0], shape, gather=split, dtype=torch.float32, impl="triton")
    assert torch.equal(out, round_trip(x, dtype=torch.float32))


@pytest.mark.parametrize("quantize", FORMS, ids=["fp8", "layout"])
def test_one_launch_packs_and_one_unpacks(random, monkeypatch, quantize):
    launches = []

    kernel = module._fp8_kernel

    class Counted:
        def __getitem__(self, grid):
            def launch(*args, PACK, **kwargs):
                launches.append((grid, PACK))
                kernel[grid](*args, PACK=PACK, **kwargs)

            return launch

    monkeypatch.setattr(module, "_fp8_kernel", Counted())
    x = random(2, 100, 4, 40)
    buffer = fp8_pack(x, world=2, scatter="heads", quantize=quantize, impl="triton")
    assert len(launches) == 1
    fp8_unpack(buffer, (2, 200, 2, 40), gather="sequence", impl="triton")
    grid = (math.ceil(100 * 2 / (module.BLOCK // 64)), 2, 2)
    assert launches == [(grid, True), (grid, False)]


def test_inputs_may_require_grad_and_the_results_do_not(random):
    x = random(1, 2, 2, 5).requires_grad_()
    for impl in IMPLS:
        for quantize in FORMS:
            buffer = fp8_pack(x, world=2, scatter="heads", quantize=quantize, impl=impl)
            assert not buffer.requires_grad
            assert not fp8_unpack(buffer, x.shape, gather="heads", impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("quantize", FORMS, ids=["fp8", "layout"])
def test_both_run_in_one_compiled_graph(random, quantize, impl):
    def there_and_back(x):
        buffer = fp8_pack(x, world=2, scatter="heads", quantize=quantize, impl=impl)
        return buffer, fp8_unpack(buffer, (2, 8, 2, 5), gather="sequence", impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    x = random(2, 4, 4, 5)
    for got, expected in zip(compiled(x), there_and_back(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("quantize", FORMS, ids=["fp8", "layout"])
def test_shapes_may_be_symbols(random, quantize, impl):
    def there_and_back(x):
        buffer = fp8_pack(x, world=2, scatter="heads", quantize=quantize, impl=impl)
        return buffer, fp8_unpack(buffer, x.shape, gather="heads", impl=impl)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (4, 7, 30):
        x = random(2, tokens, 4, 5)
        for got, expected in zip(compiled(x), there_and_back(x), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("quantize", FORMS, ids=["fp8", "layout"])
def test_offsets_may_pass_2_to_the_31(random, device, quantize):
    """Between the tokens lies memory that nobody touches."""
    memory = torch.empty(2**31 + 20, dtype=torch.float16, device=device)
    x = memory.as_strided((1, 3, 4, 5), (0, 2**30, 5, 1))
    x.copy_(random(1, 3, 4, 5))
    options = {"world": 1, "scatter": "sequence", "quantize": quantize, "impl": "triton"}
    assert torch.equal(fp8_pack(x, **options), fp8_pack(x.contiguous(), **options))


def test_pack_rejects_what_does_not_fit():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"'heads', 'sequence'.* got 'batch'"):
        fp8_pack(x, world=2, scatter="batch")
    with pytest.raises(ValueError, match=r"heads must be divisible .* got 4 and 3"):
        fp8_pack(x, world=3, scatter="heads")
    with pytest.raises(ValueError, match=r"sequence must be divisible .* got 3 and 2"):
        fp8_pack(x, world=2, scatter="sequence")
    with pytest.raises(ValueError, match="got 4 and 0"):
        fp8_pack(x, world=0, scatter="heads")
    with pytest.raises(ValueError, match=r"\(B, S, H, D\) with D >= 1, got \(3, 4, 5\)"):
        fp8_pack(x[0], world=2, scatter="heads")
    with pytest.raises(ValueError, match="D >= 1"):
        fp8_pack(x[..., :0], world=2, scatter="heads")
    with pytest.raises(ValueError, match=r"dtype of .* got torch.float64"):
        fp8_pack(x.double(), world=2, scatter="heads")


def test_unpack_rejects_what_does_not_fit():
    buffer, shape = torch.zeros(2, 80, dtype=torch.uint8), (1, 2, 4, 15)
    assert fp8_unpack(buffer, shape, gather="heads").shape == shape
    with pytest.raises(ValueError, match=r"from 2 ranks must be \(2, 96\), got \(2, 80\)"):
        fp8_unpack(buffer, (1, 2, 4, 17), gather="heads")
    with pytest.raises(ValueError, match=r"from 2 ranks must be \(2, 60\), got \(2, 80\)"):
        fp8_unpack(buffer.half(), shape, gather="heads")
    with pytest.raises(ValueError, match=r"and contiguous, got \(80, 2\) and \(1, 80\)"):
        fp8_unpack(buffer.t(), shape, gather="heads")
    with pytest.raises(ValueError, match="multiple of 4 bytes, for the scales, got 1"):
        fp8_unpack(torch.zeros(161, dtype=torch.uint8)[1:].view(2, 80), shape, gather="heads")
    with pytest.raises(ValueError, match="gather must be one of"):
        fp8_unpack(buffer, shape, gather="batch")
    with pytest.raises(ValueError, match=r"sequence must be divisible .* got 3 and 2"):
        fp8_unpack(buffer, (1, 3, 4, 15), gather="sequence")
    with pytest.raises(ValueError, match=r"got torch.uint8 and torch.float64"):
        fp8_unpack(buffer, shape, gather="heads", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got torch.int32 and torch.int32"):
        fp8_unpack(buffer.int(), shape, gather="heads")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("quantize", FORMS, ids=["fp8", "layout"])
def test_the_ops_are_registered_as_they_behave(random, quantize, impl):
    x, ops = random(1, 2, 4, 5), torch.ops.dbcache
    torch.library.opcheck(ops.fp8_pack.default, (x, 2, "heads", quantize, impl))
    buffer = fp8_pack(x, world=2, scatter="heads", quantize=quantize, impl=impl)
    args = (buffer, [1, 4, 2, 5], "sequence", torch.bfloat16, impl)
    torch.library.opcheck(ops.fp8_unpack.default, args)
