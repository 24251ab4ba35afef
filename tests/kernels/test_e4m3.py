"""The fp8 format: codes, scales and what comes back, against PyTorch's own conversion."""

import pytest
import torch
import triton
import triton.language as tl

from dbcache.kernels.common import e4m3
from dbcache.kernels.common.e4m3 import decode, dequantize, encode, quantize, quantize_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NATIVE = [False, True] if e4m3.is_native(DEVICE) else [False]
"""Whether conversions are instructions. Those of the interpreter round subnormals down."""
NAN = float("nan")
INF = float("inf")


@triton.jit
def encode_all(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, encode(x).to(tl.uint8), mask=offsets < size)


@triton.jit
def decode_all(codes_ptr, out_ptr, NATIVE: tl.constexpr):
    offsets = tl.arange(0, 256)
    tl.store(out_ptr + offsets, decode(tl.load(codes_ptr + offsets), NATIVE))


@triton.jit
def quantize_all(x_ptr, codes_ptr, scales_ptr, COLUMNS: tl.constexpr, NATIVE: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, COLUMNS)[None, :]
    codes, scales = quantize_rows(tl.load(x_ptr + row * COLUMNS + columns), NATIVE)
    tl.store(codes_ptr + row * COLUMNS + columns, codes)
    tl.store(scales_ptr + row + tl.arange(0, 1), scales)


def encoded(x):
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    encode_all[(triton.cdiv(x.numel(), 8192),)](x, codes, x.numel(), BLOCK=8192)
    return codes


def expected_codes(x):
    """Return PyTorch's codes on the CPU; it saturates, and keeps NaN's sign or not."""
    x = x.float().cpu()
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_encodes_every_16_bit_number_as_pytorch_does(device, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    got, nan = encoded(x).cpu(), x.isnan().cpu()
    assert torch.equal(got[~nan], expected_codes(x)[~nan])
    assert ((got[nan] & 0x7F) == 0x7F).all()


def test_encodes_float32_around_every_code_and_every_tie_as_pytorch_does(device):
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    centers = torch.cat((values, ties, torch.tensor([464.0, 2.0**-10]))).view(torch.int32)
    bits = (centers[:, None] + torch.arange(-40, 41, dtype=torch.int32)).clamp(min=0)
    x = torch.cat((bits.view(torch.float32), -bits.view(torch.float32))).flatten().to(device)
    assert torch.equal(encoded(x).cpu(), expected_codes(x))
    random = torch.randint(-(2**31), 2**31, (60_000,), generator=torch.Generator().manual_seed(0))
    x = random.to(torch.int32).view(torch.float32)
    x = torch.where(x.isnan(), 0, x).to(device)
    assert torch.equal(encoded(x).cpu(), expected_codes(x))


@pytest.mark.parametrize("native", NATIVE)
def test_decodes_every_code_as_pytorch_does(device, native):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    got = torch.empty(256, device=device)
    decode_all[(1,)](codes, got, NATIVE=native)
    expected = codes.cpu().view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(got[:1]), torch.tensor([False], device=device))
    assert torch.signbit(got[0x80])


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-30, 1e-3, 1.0, 1e30], ids=str)
def test_rows_are_quantized_alike_in_triton_and_in_pytorch(random, device, scale, native):
    x = random(5, 32) * scale
    x[0] = 0.0
    x[1, 3], x[1, 4], x[2, 5] = NAN, INF, -INF
    x[4, 0] = 3.4e38 if scale > 1 else x[4, 0]
    codes = torch.empty(5, 32, dtype=torch.uint8, device=device)
    scales = torch.empty(5, device=device)
    quantize_all[(5,)](x, codes, scales, COLUMNS=32, NATIVE=native)
    expected_codes, expected_scales = quantize(x)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 17, 96), (3, 5), (2, 3072)], ids=str)
def test_the_error_is_within_the_format_s_bound(random, shape, dtype):
    x = random(*shape, dtype=dtype).float()
    x = x * torch.exp(4 * random(*shape[:-1], 1)) * (random(*shape).abs() > 0.1)
    codes, scales = quantize(x)
    assert torch.equal(scales, (x.abs().amax(-1) / 448).clamp(min=2**-126))
    error = (dequantize(codes, scales).double() - x.double()).abs()
    # and float32's own roundings, in the scale and in the product
    bound = torch.maximum(x.double().abs() / 16, scales[..., None].double() / 1024)
    assert (error <= bound * (1 + 1e-5)).all()


def test_the_largest_element_of_a_token_comes_back_as_it_is(random):
    x = random(64, 32)
    back, at = dequantize(*quantize(x)), x.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(back.gather(-1, at), x.gather(-1, at), rtol=3e-7, atol=0)


def test_what_is_not_finite_comes_back_as_nan_and_spares_the_rest_of_its_token():
    x = torch.tensor([[1.0, NAN, 2.0, -448.0], [INF, -INF, 3.0, 4.0], [NAN, NAN, INF, NAN]])
    back = dequantize(*quantize(x))
    expected = torch.tensor([[1.0, NAN, 2.0, -448.0], [NAN, NAN, 3.0, 4.0], [NAN] * 4])
    torch.testing.assert_close(back, expected, equal_nan=True, rtol=1 / 16, atol=0)


def test_zeros_and_empty_tokens_have_the_smallest_scale():
    codes, scales = quantize(torch.zeros(2, 3))
    assert codes.max() == 0
    assert scales.tolist() == [e4m3.SMALLEST_SCALE] * 2
    codes, scales = quantize(torch.zeros(2, 0))
    assert codes.shape == (2, 0)
    assert scales.shape == (2,)
