"""The fp8 format of stored activations: e4m3 codes with one float32 scale per token.

    scale = max(max|x| / 448, 2**-126)      over the token, the last dimension
    code  = e4m3(x * (1 / scale))           rounded to nearest even, the reciprocal and product, too
    x'    = code * scale

So |x' - x| <= max(|x| / 16, scale / 1024), to float32's rounding: 3 bits of mantissa, and
subnormals below scale / 64. The reciprocal is a normal number for each scale there is.
An element that is not finite comes back as NaN and does not touch the rest of its token; the
lower bound of the scale is what tokens of zeros have, and keeps it a normal number.

A code is a uint8, and the bytes are the same everywhere: made and read by the conversions of NVIDIA
GPUs from sm_89 on (`is_native`), and by integer arithmetic elsewhere, as older ones have none and
gfx942's own format is another one. The conversion to e4m3 (``cvt.rn.satfinite.e4m3x2.f32``) rounds
to nearest even, keeps the sign of zero, makes subnormals, and takes what rounds beyond 448 to 448;
NaN, which stands for all that is not finite, becomes 0x7F. The conversion from e4m3 is exact; 0x7F
and 0xFF are NaN.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.checks import check_tensor
from dbcache.kernels.common.constants import Constants
from dbcache.kernels.common.launches import cdiv
from dbcache.kernels.common.select import invalid

LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126
NAN_CODE = 0x7F
MAX_WIDTH = 16384
"""Longest token: a program of `commit` keeps one in registers."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of float32 `x` (..., D), uint8, and its scales (...), float32."""
    if x.numel() == 0:
        return x.to(torch.uint8), x.new_full(x.shape[:-1], SMALLEST_SCALE)
    lost = ~x.isfinite()
    largest = x.abs().masked_fill_(lost, 0.0).amax(-1)
    # divide by a tensor: by a number, PyTorch on a GPU multiplies with the rounded reciprocal
    scales = (largest / torch.full_like(largest, LARGEST)).clamp_(min=SMALLEST_SCALE)
    inverse = torch.full_like(scales, 1.0) / scales
    codes = (x * inverse[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill_(lost, NAN_CODE), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values of uint8 `codes` (..., D) with float32 `scales` (...)."""
    return codes.view(torch.float8_e4m3fn).float() * scales[..., None]


def _tokens_and_width(x: Tensor | None) -> tuple[int, int]:
    """Return the number of tokens of `x` (..., D), and D; (0, 0) for None."""
    if x is None or x.numel() == 0:
        return 0, 0
    return x.numel() // x.shape[-1], x.shape[-1]


def tiles(
    h: Tensor, encoder: Tensor | None, tile: Callable[[int, int], tuple[int, int, int]]
) -> tuple[int, dict[str, int], int]:
    """Return programs, sizes and warps of a launch for both streams, a tile per program.

    Args:
        h: hidden states, (..., D).
        encoder: encoder states, None where there are none.
        tile: returns rows (tokens), columns and warps of a program, from the width of the longest
            token and the bytes of its elements.
    """
    (tokens, width), (encoder_tokens, encoder_width) = map(_tokens_and_width, (h, encoder))
    rows, columns, warps = tile(max(width, encoder_width), h.itemsize)
    parts = cdiv(tokens, rows) * cdiv(width, columns)
    tail = {"tokens": tokens, "width": width, "blocks": parts, "encoder_tokens": encoder_tokens}
    tail |= {"encoder_width": encoder_width, "NATIVE": is_native(h.device)}
    tail |= {"ROWS": rows, "COLUMNS": columns}
    return parts + cdiv(encoder_tokens, rows) * cdiv(encoder_width, columns), tail, warps


def check_scales(op: str, name: str, ring: Tensor, scales: Tensor) -> None:
    """Raise unless `scales` fit the fp8 `ring` (K, ..., D) of the stream `name`."""
    if ring.ndim < 2 or ring.shape[-1] > MAX_WIDTH:
        must = f"the fp8 ring of {name} must have tokens (..., D) with D <= {MAX_WIDTH}"
        raise invalid(op, must, tuple(ring.shape[1:]))
    form = (torch.float32, ring.shape[:-1], ring.device)
    check_tensor(op, f"the scales of {name}", scales, *form, contiguous=True)


E4M3 = Constants(globals())


@lru_cache
def is_native(device: torch.device) -> bool:
    """Whether a device has the conversions of this format as instructions."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def quantize_rows(x, NATIVE: tl.constexpr):
    """Return the codes of a float32 tile, a token per row, and the scales of its rows."""
    magnitude = tl.abs(x)
    finite = magnitude < float("inf")  # false for NaN
    largest = tl.max(tl.where(finite, magnitude, 0.0), 1)
    # div_rn: `/` is off by an ulp on a GPU, which would change the bytes
    scales = tl.maximum(tl.div_rn(largest, E4M3.LARGEST), E4M3.SMALLEST_SCALE)
    # a reciprocal per row: a division takes some 30 instructions per element
    scaled = x * tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales)[:, None]
    if NATIVE:
        scaled = tl.where(finite, scaled, float("nan"))
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = tl.where(finite, encode(scaled), E4M3.NAN_CODE).to(tl.uint8)
    return codes, scales


@triton.jit
def encode(x):
    """Return the e4m3 codes of float32 `x` in the low 8 bits of uint32; beyond 448 they are 448."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # nearest even: add half of the last place that stays, less one where that place is even;
    # then subtract 120, the difference of the exponents' biases
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # below 2**-6: the last place of 2**14 + |x| is 2**-9, the spacing of e4m3's subnormals
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude > 0x7F800000, E4M3.NAN_CODE, code)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def decode(codes, NATIVE: tl.constexpr):
    """Return the exact float32 values of uint8 e4m3 `codes`."""
    if NATIVE:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        codes = codes.to(tl.uint16)
        magnitude = codes & 0x7F
        # the bits of a float16 with the same sign, exponent and mantissa, whose bias is larger by 8
        bits = (magnitude << 7) | ((codes & 0x80) << 8)
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        values = tl.where(magnitude == E4M3.NAN_CODE, float("nan"), values)
    return values
