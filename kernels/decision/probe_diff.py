"""How much the probe residual changed since the last full step.

    P = h_fn - h_in                        what the first blocks added, in the dtype of p_ref
    num, den = sum|P - p_ref|, sum|p_ref|  per sample, so num / den is the relative L1

Without `h_in`, P is h_fn itself: hidden states are compared with hidden states. With thresholds,
each token is measured by itself, and num and den are also summed over the important tokens, which
changed most.

One pass over the three inputs: 3 * numel * itemsize bytes read, 8 bytes written per program, so
the kernel is bound by memory bandwidth. The criterion is the first-block cache's
(github.com/chengzeyi/ParaAttention); on the input of each block, without `h_in`, it is DBPrune's
(github.com/vipshop/cache-dit).

The same inputs give the same bits on every run, every GPU and with every number of warps: which
elements a partial sum covers depends on their number only, and they are added in a fixed order.
Lane i of a program first adds up elements i, i + BLOCK, i + 2 * BLOCK, ...; then neighbouring lanes
are added until one is left.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.checks import check_activations
from dbcache.kernels.common.lane_state import IMPORTANT, LANE
from dbcache.kernels.common.launches import BLOCK, contiguous, launch_of
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import Impl, invalid, select, without_gradient
from dbcache.kernels.common.sums import lanes_of, log2, partition, tree_sums_of_two


def probe_diff(
    h_in: Tensor | None,
    h_fn: Tensor,
    p_ref: Tensor,
    thresholds: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
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
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    Returns:
        float32 (B, T, 2) on the same device: ``[..., 0]`` of ``|P - p_ref|``, ``[..., 1]`` of
        ``|p_ref|``. With `thresholds` (B, T, 4): ``[..., 2:]`` are those of important tokens. T is
        at most `MAX_PARTIALS`, and 1 for the reference. No gradient, no synchronisation.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_probe("probe_diff", h_in, h_fn, p_ref, thresholds is not None)
    return _probe_diff(impl, h_in, h_fn, p_ref, thresholds)


def probe_diff_reference(
    h_in: Tensor | None, h_fn: Tensor, p_ref: Tensor, thresholds: Tensor | None = None
) -> Tensor:
    """Plain PyTorch, the meaning of `probe_diff`."""
    return torch.stack(sums_of_samples(h_in, h_fn, p_ref, thresholds), -1).unsqueeze_(1)


@without_gradient
def sums_of_samples(
    h_in: Tensor | None, h_fn: Tensor, p_ref: Tensor, thresholds: Tensor | None
) -> list[Tensor]:
    """Return the two or four sums of `probe_diff`, of all that a sample has: each (B,)."""
    if thresholds is None:
        return [change_of_samples(h_in, h_fn, p_ref), size_of_samples(p_ref)]
    num = _change(h_in, h_fn, p_ref).sum(-1).flatten(1)
    den = p_ref.abs().sum(-1, dtype=torch.float32).flatten(1)
    rest = ~((num / den > thresholds[IMPORTANT]) | num.isnan() | den.isnan())
    sums = (num, den, num.masked_fill(rest, 0), den.masked_fill(rest, 0))
    return [x.sum(1) for x in sums]


@without_gradient
def change_of_samples(h_in: Tensor | None, h_fn: Tensor, p_ref: Tensor) -> Tensor:
    """Return the first sum of `probe_diff` alone."""
    return _of_samples(_change(h_in, h_fn, p_ref))


@without_gradient
def size_of_samples(p_ref: Tensor) -> Tensor:
    """Return the second sum of `probe_diff`: it is that of the last full step until the next."""
    return _of_samples(p_ref.abs())


def _change(h_in: Tensor | None, h_fn: Tensor, p_ref: Tensor) -> Tensor:
    """Return ``|P - p_ref|`` in float32, with P rounded as the reference was."""
    dtype = p_ref.dtype
    if h_in is None:
        p = h_fn.to(dtype)
    elif dtype is not h_in.dtype:
        p = (h_fn.float() - h_in.float()).to(dtype)
    else:
        p = torch.sub(h_fn, h_in)  # PyTorch subtracts in float32 and rounds once
    return (p.float() - p_ref).abs_()


def _of_samples(x: Tensor) -> Tensor:
    """Return the sum of each sample, (B,)."""
    return x.sum(tuple(range(1, x.ndim)), dtype=torch.float32) if x.ndim > 1 else x.float()


def check_probe(who: str, h_in: Tensor | None, h_fn: Tensor, p_ref: Tensor, by_token: bool) -> None:
    """Raise a ValueError, as from `who`, unless the inputs of `probe_diff` fit."""
    check_activations(who, p_ref, h_in=h_in, h_fn=h_fn)
    if h_fn.ndim == 0 or h_fn.shape[0] == 0:
        raise invalid(who, "h_fn must be (B, ...) with B >= 1", tuple(h_fn.shape))
    if by_token and h_fn.ndim < 3:
        raise invalid(who, "tokens need a shape (B, ..., width)", tuple(h_fn.shape))


def _fake(h_in, h_fn, p_ref, thresholds, impl):
    by_token = thresholds is not None
    programs = partition(h_fn.shape, by_token)[1] if select(impl, h_fn) == "triton" else 1
    return h_fn.new_empty((h_fn.shape[0], programs, 4 if by_token else 2), dtype=torch.float32)


@op(probe_diff_reference, like="h_fn", fake=_fake)
def _probe_diff(h_in, h_fn, p_ref, thresholds):
    h_in, h_fn, p_ref = contiguous(h_in, h_fn, p_ref)
    batch, by_token = h_fn.shape[0], thresholds is not None
    per_program, programs = partition(h_fn.shape, by_token)
    sums = 4 if by_token else 2
    partials = torch.empty(batch, programs, sums, device=h_fn.device, dtype=torch.float32)
    launch = launch_of("probe_diff tokens" if by_token else "probe_diff", h_fn)
    _probe_diff_kernel[(programs, batch)](
        h_in, h_fn, p_ref, partials, h_fn.numel() // batch, per_program,
        thresholds, h_fn.shape[-1],
        LOG_BLOCK=log2(BLOCK), num_warps=launch.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return partials


class Probe(NamedTuple):
    """Inputs, output and share of a program of the probes, in a kernel; see `probe_diff`."""

    h_in_ptr: Any
    h_fn_ptr: Any
    p_ref_ptr: Any
    partials_ptr: Any
    size: Any
    per_program: Any
    width: Any


@triton.jit(do_not_specialize=["per_program"])
def _probe_diff_kernel(
    h_in_ptr, h_fn_ptr, p_ref_ptr, partials_ptr, size, per_program, thresholds_ptr, width,
    LOG_BLOCK: tl.constexpr,
):  # fmt: skip
    probe = Probe(h_in_ptr, h_fn_ptr, p_ref_ptr, partials_ptr, size, per_program, width)
    if thresholds_ptr is None:
        store_partial(probe, LOG_BLOCK)
    else:
        store_partial_by_token(probe, thresholds_ptr, LOG_BLOCK)


@triton.jit
def store_partial(probe, LOG_BLOCK: tl.constexpr):
    """Store the two sums of program (program, sample) of a grid (programs, samples)."""
    program, sample = tl.program_id(0), tl.program_id(1)
    base = sample.to(tl.int64) * probe.size
    num = tl.zeros((1 << LOG_BLOCK,), tl.float32)
    den = num
    for i in range(probe.per_program):
        inside = lanes_of(program, probe.per_program, i, LOG_BLOCK)
        num, den = _add(probe, base + inside, inside < probe.size, num, den)
    out_ptr = probe.partials_ptr + (sample * tl.num_programs(0) + program) * 2
    num, den = tree_sums_of_two(num, den, LOG_BLOCK)
    tl.store(out_ptr, num)
    tl.store(out_ptr + 1, den)


@triton.jit
def store_partial_by_token(probe, thresholds_ptr, LOG_BLOCK: tl.constexpr):
    """Store the four sums of `per_program` tokens of `width` elements, one token at a time."""
    program, sample = tl.program_id(0), tl.program_id(1)
    num = tl.full((), 0.0, tl.float32)
    den, important_num, important_den = num, num, num
    for i in range(probe.per_program):
        start = (program.to(tl.int64) * probe.per_program + i) * probe.width
        nums = tl.zeros((1 << LOG_BLOCK,), tl.float32)
        dens = nums
        for block in range(tl.cdiv(probe.width, 1 << LOG_BLOCK)):
            inside = (block << LOG_BLOCK) + tl.arange(0, 1 << LOG_BLOCK)
            # the last program may have fewer tokens
            mask = inside < tl.minimum(probe.width, probe.size - start)
            offsets = sample.to(tl.int64) * probe.size + start + inside
            nums, dens = _add(probe, offsets, mask, nums, dens)
        token_num, token_den = tree_sums_of_two(nums, dens, LOG_BLOCK)
        important = tl.div_rn(token_num, token_den) > tl.load(thresholds_ptr + LANE.IMPORTANT)
        important |= (token_num != token_num) | (token_den != token_den)
        num += token_num
        den += token_den
        important_num += tl.where(important, token_num, 0.0)
        important_den += tl.where(important, token_den, 0.0)
    out_ptr = probe.partials_ptr + (sample * tl.num_programs(0) + program) * 4
    tl.store(out_ptr, num)
    tl.store(out_ptr + 1, den)
    tl.store(out_ptr + 2, important_num)
    tl.store(out_ptr + 3, important_den)


@triton.jit
def _add(probe, offsets, mask, num, den):
    """Add the elements at `offsets` to the two sums of each lane."""
    h_fn = tl.load(probe.h_fn_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    p_ref = tl.load(probe.p_ref_ptr + offsets, mask=mask, other=0.0)
    p = h_fn
    if probe.h_in_ptr is not None:
        p = h_fn - tl.load(probe.h_in_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # rounded as commit stores it, so that equal inputs differ by exactly 0
    p = p.to(p_ref.dtype).to(tl.float32)
    p_ref = p_ref.to(tl.float32)
    return num + tl.abs(p - p_ref), den + tl.abs(p_ref)
