"""Two partial attentions over disjoint keys, merged into the attention over both.

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

Ring attention does this after each step. One launch, one pass, no intermediate, so the kernel is
bound by memory bandwidth. The merge is that of flash attention's blocks (arXiv:2205.14135), as
used by github.com/zhuzilin/ring-flash-attention.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.checks import check_shared, check_tensor
from dbcache.kernels.common.launches import cdiv, power_of_2
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import DTYPES, Impl, invalid, without_gradient

BLOCK = 2048
STRIDES = [f"{x}_stride_{of}" for x in ("out_a", "out_b", "lse_a", "lse_b") for of in "bsh"]
"""Arguments of the kernel that would have variants by resolution; `ALIGN` says what counts."""


def merge_attention(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of the attention over the keys of both partials.

    Everything is float32 inside; the output is rounded once. To add up many partials, keep the
    running output in float32: ``out_dtype=torch.float32`` at the first merge, and `out_a` is then
    float32 where `out_b` need not be.

    Args:
        out_a: output of the first partial, (B, S, H, D), float32, float16 or bfloat16. Any
            strides; copied first where D is not contiguous.
        lse_a: its log-sum-exp of the scaled scores, natural logarithm, float32 (B, S, H), any
            strides. Where it is -inf the partial had no key, and `out_a` is not looked at.
        out_b: as `out_a`; its dtype may be another one.
        lse_b: as `lse_a`.
        out_dtype: dtype of the output, one of the three; None for that of `out_a`.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    Returns:
        The output (B, S, H, D) and its log-sum-exp, float32 (B, S, H), both new and contiguous.
        Where both partials had no key, 0 and -inf; where a log-sum-exp is NaN or +inf, NaN. No
        gradient, no synchronisation.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    out_dtype = out_a.dtype if out_dtype is None else out_dtype
    who = "merge_attention"
    if out_a.ndim != 4 or out_a.shape != out_b.shape or out_a.shape[3] == 0:
        must = "out_a and out_b must share a shape (B, S, H, D) with D >= 1"
        raise invalid(who, must, tuple(out_a.shape), tuple(out_b.shape))
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_tensor(who, name, lse, torch.float32, out_a.shape[:3])
    if any(dtype not in DTYPES for dtype in (out_a.dtype, out_b.dtype, out_dtype)):
        must = f"out_a, out_b and out_dtype must have a dtype of {DTYPES}"
        raise invalid(who, must, out_a.dtype, out_b.dtype, out_dtype)
    check_shared(who, "device", out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return _merge_attention(impl, out_a, lse_a, out_b, lse_b, out_dtype)


@without_gradient
def merge_attention_reference(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, the meaning of `merge_attention`."""
    top = torch.maximum(lse_a, lse_b)
    # finite where both are -inf, so that both weights are exp(-inf) = 0
    top = top.masked_fill(top == -math.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    norm = total.masked_fill(total == 0, 1.0).reciprocal()
    a = out_a.float() * (weight_a * norm).unsqueeze(-1)
    b = out_b.float() * (weight_b * norm).unsqueeze(-1)
    # a partial without keys may hold NaN
    out = a.masked_fill((lse_a == -math.inf).unsqueeze(-1), 0.0)
    out += b.masked_fill((lse_b == -math.inf).unsqueeze(-1), 0.0)
    return out.to(out_dtype).contiguous(), (top + total.log()).contiguous()


def _fake(out_a, lse_a, out_b, lse_b, out_dtype, impl):
    return out_a.new_empty(out_a.shape, dtype=out_dtype), lse_a.new_empty(lse_a.shape)


@op(merge_attention_reference, like="out_a", fake=_fake)
def _merge_attention(out_a, lse_a, out_b, lse_b, out_dtype):
    batch, tokens, heads, width = out_a.shape
    out_a = out_a if out_a.stride(3) == 1 else out_a.contiguous()
    out_b = out_b if out_b.stride(3) == 1 else out_b.contiguous()
    out = torch.empty(out_a.shape, dtype=out_dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    if out.numel() == 0:
        return out, lse
    strides = (*out_a.stride()[:3], *out_b.stride()[:3])
    block_d = power_of_2(width)
    block_rows = max(1, BLOCK // block_d)
    _merge_attention_kernel[(cdiv(tokens * heads, block_rows), batch)](
        out_a, lse_a, out_b, lse_b, out, lse, tokens * heads, heads,
        *strides, *lse_a.stride(), *lse_b.stride(), D=width, ALIGN=math.gcd(16, *strides),
        BLOCK_ROWS=block_rows, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["rows", "heads", *STRIDES])
def _merge_attention_kernel(
    out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr, out_ptr, lse_ptr, rows, heads,
    out_a_stride_b, out_a_stride_s, out_a_stride_h, out_b_stride_b, out_b_stride_s, out_b_stride_h,
    lse_a_stride_b, lse_a_stride_s, lse_a_stride_h, lse_b_stride_b, lse_b_stride_s, lse_b_stride_h,
    D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row is one head of one token; a program merges `BLOCK_ROWS` of one sample's `rows`.

    The strides of the outputs are multiples of `ALIGN`, which lets the compiler widen the loads.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    batch = tl.program_id(1).to(tl.int64)
    inside = row < rows
    s = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)

    a_ptrs = lse_a_ptr + batch * lse_a_stride_b + s * lse_a_stride_s + h * lse_a_stride_h
    b_ptrs = lse_b_ptr + batch * lse_b_stride_b + s * lse_b_stride_s + h * lse_b_stride_h
    lse_a = tl.load(a_ptrs, mask=inside, other=0.0)
    lse_b = tl.load(b_ptrs, mask=inside, other=0.0)
    top = tl.maximum(lse_a, lse_b)
    # finite where both are -inf, so that both weights are exp(-inf) = 0
    top = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(lse_a - top)
    weight_b = tl.exp(lse_b - top)
    total = weight_a + weight_b
    out_row = batch * rows + row
    tl.store(lse_ptr + out_row, top + tl.log(total), mask=inside)
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)

    a_rows = batch * out_a_stride_b + s * out_a_stride_s + h * out_a_stride_h
    b_rows = batch * out_b_stride_b + s * out_b_stride_s + h * out_b_stride_h
    a_rows, b_rows = tl.multiple_of(a_rows, ALIGN), tl.multiple_of(b_rows, ALIGN)
    d = tl.arange(0, BLOCK_D)[None, :]
    # a partial without keys is not read: it saves the bytes, and it may hold anything
    a_mask = (inside & (lse_a != float("-inf")))[:, None] & (d < D)
    b_mask = (inside & (lse_b != float("-inf")))[:, None] & (d < D)
    a = tl.load(out_a_ptr + a_rows[:, None] + d, mask=a_mask, other=0.0).to(tl.float32)
    b = tl.load(out_b_ptr + b_rows[:, None] + d, mask=b_mask, other=0.0).to(tl.float32)
    out = a * (weight_a * norm)[:, None] + b * (weight_b * norm)[:, None]
    out_ptrs = out_ptr + out_row[:, None] * D + d
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (d < D))
