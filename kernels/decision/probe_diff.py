"""How much the probe residual changed since the last full step.

    P = h_fn - h_in                        what the first blocks added, in the dtype of p_ref
    num, den = sum|P - p_ref|, sum|p_ref|  per sample, so num / den is the relative L1

Without `h_in`, P is h_fn itself: hidden states are compared with hidden states. Given thresholds,
tokens are told apart, and num and den are also summed over the important ones, those that changed
most.

One pass over the three inputs: 3 * numel * itemsize bytes read, 8 bytes written per program, so
the kernel is bound by memory bandwidth. The criterion is the first-block cache's
(github.com/chengzeyi/ParaAttention); on the input of each block, without `h_in`, it is DBPrune's
(github.com/vipshop/cache-dit).

The same inputs give the same bits on every run, every GPU and with every number of warps: which
elements a partial sum covers depends on their number only, and they are added in a fixed order.
Lane i of a program first adds up elements i, i + BLOCK, i + 2 * BLOCK, ...; then neighbouring lanes
are added until one is left.
"""

import torch
import triton
import triton.language as tl

from dbcache.kernels.common.lane_state import IMPORTANT
from dbcache.kernels.common.launches import BLOCK, launch_of
from dbcache.kernels.common.select import (
    DTYPES,
    Impl,
    invalid,
    is_traced,
    select,
    without_gradient,
)
from dbcache.kernels.common.sums import tree_sum_lanes

MAX_PARTIALS = 1024
"""Most partial sums per sample, which is what one program of `decide` adds up."""


def probe_diff(
    h_in: torch.Tensor | None,
    h_fn: torch.Tensor,
    p_ref: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Return partial sums of ``|P - p_ref|`` and ``|p_ref|``, where ``P = h_fn - h_in``.

    P is rounded to the dtype of `p_ref`, as `commit` stores it, so an unchanged input gives
    exactly 0; the sums are float32.

    Args:
        h_in: activations before the probe blocks, as `h_fn`; None: P is `h_fn`.
        h_fn: activations after the probe blocks, (B, ...) with B >= 1, float32, float16 or
            bfloat16. Any strides; what is not contiguous is copied first.
        p_ref: P of the last full step, same shape and device, one of the dtypes.
        thresholds: float32 (NUM_THRESHOLDS,), of a `LaneState`: tell tokens apart. A token is a
            row of (B, ..., width), important if its own num / den is above
            ``thresholds[IMPORTANT]``, or NaN. Its sums are in a fixed order, too.
        impl: ``"triton"``, ``"reference"`` (plain PyTorch, any device), or ``"auto"``, which takes
            Triton for tensors on a GPU. An implementation asked for by name never falls back.

    Returns:
        float32 (B, T, 2) on the same device: ``[..., 0]`` of ``|P - p_ref|``, ``[..., 1]`` of
        ``|p_ref|``. With `thresholds` (B, T, 4): ``[..., 2:]`` are those of important tokens. T is
        at most `MAX_PARTIALS`, and 1 for the reference. No gradient, no synchronisation.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_probe("probe_diff", h_in, h_fn, p_ref, thresholds is not None)
    if is_traced(h_fn):
        with torch.no_grad():
            return _probe_diff_op(h_in, h_fn, p_ref, thresholds, impl)
    if select(impl, h_fn) == "triton":
        return _probe_diff_triton(h_in, h_fn, p_ref, thresholds)
    return probe_diff_reference(h_in, h_fn, p_ref, thresholds)


@without_gradient
def probe_diff_reference(
    h_in: torch.Tensor | None,
    h_fn: torch.Tensor,
    p_ref: torch.Tensor,
    thresholds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch, the meaning of `probe_diff`."""
    if h_in is None:
        p = h_fn.to(p_ref.dtype).float()
    elif p_ref.dtype == h_in.dtype:
        p = torch.sub(h_fn, h_in).float()  # PyTorch subtracts in float32 and rounds once
    else:
        p = (h_fn.float() - h_in.float()).to(p_ref.dtype).float()
    if p.ndim == 1:
        p, p_ref = p[:, None], p_ref[:, None]
    if thresholds is not None:
        return _sums_by_token((p - p_ref).abs_(), p_ref.abs(), thresholds)
    features = tuple(range(1, p.ndim))
    num = (p - p_ref).abs_().sum(features)
    den = p_ref.abs().sum(features, dtype=torch.float32)
    return torch.stack((num, den), -1).unsqueeze_(1)


def _sums_by_token(
    change: torch.Tensor, size: torch.Tensor, thresholds: torch.Tensor
) -> torch.Tensor:
    """Return (B, 1, 4) sums: of all tokens, and of those that changed more than the threshold."""
    num = change.sum(-1).flatten(1)
    den = size.sum(-1, dtype=torch.float32).flatten(1)
    rest = ~((num / den > thresholds[IMPORTANT]) | num.isnan() | den.isnan())
    sums = (num, den, num.masked_fill(rest, 0), den.masked_fill(rest, 0))
    return torch.stack([x.sum(1) for x in sums], -1).unsqueeze_(1)


def check_probe(
    who: str, h_in: torch.Tensor | None, h_fn: torch.Tensor, p_ref: torch.Tensor, by_token: bool
) -> None:
    """Raise a ValueError in the name of `who` unless the inputs of `probe_diff` fit."""
    first = h_fn if h_in is None else h_in
    if not (first.shape == h_fn.shape == p_ref.shape) or h_fn.ndim == 0 or h_fn.shape[0] == 0:
        shapes = (tuple(x.shape) for x in (first, h_fn, p_ref))
        must = "h_in, h_fn and p_ref must share a shape (B, ...) with B >= 1"
        raise invalid(who, must, *shapes)
    if by_token and h_fn.ndim < 3:
        raise invalid(who, "tokens need a shape (B, ..., width)", tuple(h_fn.shape))
    if first.dtype != h_fn.dtype or h_fn.dtype not in DTYPES or p_ref.dtype not in DTYPES:
        must = f"h_in and h_fn must share a dtype, and it and p_ref's must be of {DTYPES}"
        raise invalid(who, must, first.dtype, h_fn.dtype, p_ref.dtype)
    if not (first.device == h_fn.device == p_ref.device):
        must = "h_in, h_fn and p_ref must be on one device"
        raise invalid(who, must, first.device, h_fn.device, p_ref.device)


def partition(shape: torch.Size, by_token: bool) -> tuple[int, int]:
    """Return (blocks or tokens per program, programs per sample); a function of the shape only."""
    return _share(shape[1:-1].numel()) if by_token else partition_of(shape[1:].numel())


def partition_of(numel: int) -> tuple[int, int]:
    """Return (blocks of elements per program, programs) for sums over `numel` elements."""
    return _share(triton.cdiv(numel, BLOCK))


def _share(parts: int) -> tuple[int, int]:
    """Return (parts per program, programs), both at least 1, of at most MAX_PARTIALS programs."""
    parts = max(1, parts)
    per_program = triton.cdiv(parts, MAX_PARTIALS)
    return per_program, triton.cdiv(parts, per_program)


def log2(power: int) -> int:
    """Return the exponent of a power of 2."""
    return power.bit_length() - 1


def _probe_diff_triton(
    h_in: torch.Tensor | None,
    h_fn: torch.Tensor,
    p_ref: torch.Tensor,
    thresholds: torch.Tensor | None,
) -> torch.Tensor:
    h_in = None if h_in is None else h_in.contiguous()
    h_fn, p_ref = h_fn.contiguous(), p_ref.contiguous()
    batch, by_token = h_fn.shape[0], thresholds is not None
    per_program, programs = partition(h_fn.shape, by_token)
    sums = 4 if by_token else 2
    partials = torch.empty(batch, programs, sums, device=h_fn.device, dtype=torch.float32)
    launch = launch_of("probe_diff tokens" if by_token else "probe_diff", h_fn)
    with torch.cuda.device_of(h_fn):
        _probe_diff_kernel[(programs, batch)](
            h_in, h_fn, p_ref, partials, h_fn.numel() // batch, per_program,
            thresholds, h_fn.shape[-1],
            LOG_BLOCK=log2(BLOCK), num_warps=launch.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return partials


@torch.library.custom_op("dbcache::probe_diff", mutates_args=())
def _probe_diff_op(
    h_in: torch.Tensor | None,
    h_fn: torch.Tensor,
    p_ref: torch.Tensor,
    thresholds: torch.Tensor | None,
    impl: str,
) -> torch.Tensor:
    if select(impl, h_fn) == "triton":
        return _probe_diff_triton(h_in, h_fn, p_ref, thresholds)
    return probe_diff_reference(h_in, h_fn, p_ref, thresholds)


@_probe_diff_op.register_fake
def _(
    h_in: torch.Tensor | None,
    h_fn: torch.Tensor,
    p_ref: torch.Tensor,
    thresholds: torch.Tensor | None,
    impl: str,
) -> torch.Tensor:
    by_token = thresholds is not None
    triton_runs = select(impl, h_fn) == "triton"
    programs = partition(h_fn.shape, by_token)[1] if triton_runs else 1
    return h_fn.new_empty((h_fn.shape[0], programs, 4 if by_token else 2), dtype=torch.float32)


_IMPORTANT = tl.constexpr(IMPORTANT)


@triton.jit
def _probe_diff_kernel(
    h_in_ptr,
    h_fn_ptr,
    p_ref_ptr,
    partials_ptr,
    size,
    per_program,
    thresholds_ptr,
    width,
    LOG_BLOCK: tl.constexpr,
):
    if thresholds_ptr is None:
        store_partial(h_in_ptr, h_fn_ptr, p_ref_ptr, partials_ptr, size, per_program, LOG_BLOCK)
    else:
        store_partial_by_token(
            h_in_ptr, h_fn_ptr, p_ref_ptr, partials_ptr, size, per_program, thresholds_ptr, width,
            LOG_BLOCK,
        )  # fmt: skip


@triton.jit
def store_partial(
    h_in_ptr, h_fn_ptr, p_ref_ptr, partials_ptr, size, per_program, LOG_BLOCK: tl.constexpr
):
    """Store the two sums of program (program, sample) of a grid (programs, samples)."""
    program, sample = tl.program_id(0), tl.program_id(1)
    base = sample.to(tl.int64) * size
    num = tl.zeros((1 << LOG_BLOCK,), tl.float32)
    den = num
    for i in range(per_program):
        inside = lanes_of(program, per_program, i, LOG_BLOCK)
        num, den = _add(h_in_ptr, h_fn_ptr, p_ref_ptr, base + inside, inside < size, num, den)
    out_ptr = partials_ptr + (sample * tl.num_programs(0) + program) * 2
    tl.store(out_ptr, tree_sum_lanes(num, LOG_BLOCK))
    tl.store(out_ptr + 1, tree_sum_lanes(den, LOG_BLOCK))


@triton.jit
def store_partial_by_token(
    h_in_ptr,
    h_fn_ptr,
    p_ref_ptr,
    partials_ptr,
    size,
    per_program,
    thresholds_ptr,
    width,
    LOG_BLOCK: tl.constexpr,
):
    """Store the four sums of `per_program` tokens of `width` elements, one token at a time."""
    program, sample = tl.program_id(0), tl.program_id(1)
    num = tl.full((), 0.0, tl.float32)
    den, important_num, important_den = num, num, num
    for i in range(per_program):
        start = (program.to(tl.int64) * per_program + i) * width
        nums = tl.zeros((1 << LOG_BLOCK,), tl.float32)
        dens = nums
        for block in range(tl.cdiv(width, 1 << LOG_BLOCK)):
            inside = (block << LOG_BLOCK) + tl.arange(0, 1 << LOG_BLOCK)
            mask = inside < tl.minimum(width, size - start)  # the last program may have fewer
            offsets = sample.to(tl.int64) * size + start + inside
            nums, dens = _add(h_in_ptr, h_fn_ptr, p_ref_ptr, offsets, mask, nums, dens)
        token_num = tree_sum_lanes(nums, LOG_BLOCK)
        token_den = tree_sum_lanes(dens, LOG_BLOCK)
        important = tl.div_rn(token_num, token_den) > tl.load(thresholds_ptr + _IMPORTANT)
        important |= (token_num != token_num) | (token_den != token_den)
        num += token_num
        den += token_den
        important_num += tl.where(important, token_num, 0.0)
        important_den += tl.where(important, token_den, 0.0)
    out_ptr = partials_ptr + (sample * tl.num_programs(0) + program) * 4
    tl.store(out_ptr, num)
    tl.store(out_ptr + 1, den)
    tl.store(out_ptr + 2, important_num)
    tl.store(out_ptr + 3, important_den)


@triton.jit
def _add(h_in_ptr, h_fn_ptr, p_ref_ptr, offsets, mask, num, den):
    """Add the elements at `offsets` to the two sums of each lane."""
    h_fn = tl.load(h_fn_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    p_ref = tl.load(p_ref_ptr + offsets, mask=mask, other=0.0)
    p = h_fn
    if h_in_ptr is not None:
        p = h_fn - tl.load(h_in_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # rounded as commit stores it, so that equal inputs differ by exactly 0
    p = p.to(p_ref.dtype).to(tl.float32)
    p_ref = p_ref.to(tl.float32)
    return num + tl.abs(p - p_ref), den + tl.abs(p_ref)


@triton.jit
def lanes_of(program, per_program, i, LOG_BLOCK: tl.constexpr):
    """Return the elements of a sample in block i of a program: 64 bits, for long videos."""
    start = (program.to(tl.int64) * per_program + i) << LOG_BLOCK
    return start + tl.arange(0, 1 << LOG_BLOCK)
