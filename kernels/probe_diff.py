"""How much the probe residual changed since the last full step.

    P = h_fn - h_in                        what the first blocks added, in the dtype of p_ref
    num, den = sum|P - p_ref|, sum|p_ref|  per sample, so num / den is the relative L1

One pass over the three inputs: 3 * numel * itemsize bytes read, 8 bytes written per program, so
the kernel is bound by memory bandwidth. The criterion is the first-block cache's
(github.com/chengzeyi/ParaAttention).
"""

import torch
import triton
import triton.language as tl

from dbcache.kernels._select import (
    DTYPES,
    Impl,
    invalid,
    is_traced,
    select,
    without_gradient,
)

BLOCK = 2048
MAX_PARTIALS = 1024
"""Most partial sums per sample, which is what one program of `decide` adds up."""


def probe_diff(
    h_in: torch.Tensor, h_fn: torch.Tensor, p_ref: torch.Tensor, *, impl: Impl = "auto"
) -> torch.Tensor:
    """Return partial sums of ``|P - p_ref|`` and ``|p_ref|``, where ``P = h_fn - h_in``.

    P is rounded to the dtype of `p_ref`, as `commit` stores it, so an unchanged input gives
    exactly 0; the sums are float32. They are the same from run to run: which elements a partial
    sum covers depends on the shape only, and there are no atomics.

    Args:
        h_in: activations before the probe blocks, (B, ...) with B >= 1, float32, float16 or
            bfloat16. Any strides; what is not contiguous is copied first.
        h_fn: activations after the probe blocks, same shape, dtype and device.
        p_ref: probe residual of the last full step, same shape and device, one of the dtypes.
        impl: ``"triton"``, ``"reference"`` (plain PyTorch, any device), or ``"auto"``, which takes
            Triton for tensors on a GPU. An implementation asked for by name never falls back.

    Returns:
        float32 (B, T, 2) on the same device: ``[..., 0]`` of ``|P - p_ref|``, ``[..., 1]`` of
        ``|p_ref|``. T is at most `MAX_PARTIALS`, and 1 for the reference. No gradient, no
        synchronisation.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(h_in, h_fn, p_ref)
    if is_traced(h_in):
        with torch.no_grad():
            return _probe_diff_op(h_in, h_fn, p_ref, impl)
    if select(impl, h_in) == "triton":
        return _probe_diff_triton(h_in, h_fn, p_ref)
    return probe_diff_reference(h_in, h_fn, p_ref)


@without_gradient
def probe_diff_reference(
    h_in: torch.Tensor, h_fn: torch.Tensor, p_ref: torch.Tensor
) -> torch.Tensor:
    """Plain PyTorch, the meaning of `probe_diff`."""
    if p_ref.dtype == h_in.dtype:
        p = torch.sub(h_fn, h_in).float()  # PyTorch subtracts in float32 and rounds once
    else:
        p = (h_fn.float() - h_in.float()).to(p_ref.dtype).float()
    if p.ndim == 1:
        p, p_ref = p[:, None], p_ref[:, None]
    features = tuple(range(1, p.ndim))
    num = (p - p_ref).abs_().sum(features)
    den = p_ref.abs().sum(features, dtype=torch.float32)
    return torch.stack((num, den), -1).unsqueeze_(1)


def _check(h_in: torch.Tensor, h_fn: torch.Tensor, p_ref: torch.Tensor) -> None:
    if not (h_in.shape == h_fn.shape == p_ref.shape) or h_in.ndim == 0 or h_in.shape[0] == 0:
        shapes = (tuple(x.shape) for x in (h_in, h_fn, p_ref))
        must = "h_in, h_fn and p_ref must share a shape (B, ...) with B >= 1"
        raise invalid("probe_diff", must, *shapes)
    if h_in.dtype != h_fn.dtype or h_in.dtype not in DTYPES or p_ref.dtype not in DTYPES:
        must = f"h_in and h_fn must share a dtype, and it and p_ref's must be of {DTYPES}"
        raise invalid("probe_diff", must, h_in.dtype, h_fn.dtype, p_ref.dtype)
    if not (h_in.device == h_fn.device == p_ref.device):
        must = "h_in, h_fn and p_ref must be on one device"
        raise invalid("probe_diff", must, h_in.device, h_fn.device, p_ref.device)


def _partition(numel: int, batch: int) -> tuple[int, int]:
    """Return (blocks per program, programs per sample); a function of the shape only."""
    blocks = max(1, triton.cdiv(numel // batch, BLOCK))
    per_program = triton.cdiv(blocks, MAX_PARTIALS)
    return per_program, triton.cdiv(blocks, per_program)


def _probe_diff_triton(h_in: torch.Tensor, h_fn: torch.Tensor, p_ref: torch.Tensor) -> torch.Tensor:
    h_in, h_fn, p_ref = h_in.contiguous(), h_fn.contiguous(), p_ref.contiguous()
    batch, numel = h_in.shape[0], h_in.numel()
    per_program, programs = _partition(numel, batch)
    partials = torch.empty(batch, programs, 2, device=h_in.device, dtype=torch.float32)
    with torch.cuda.device_of(h_in):
        _probe_diff_kernel[(programs, batch)](
            h_in,
            h_fn,
            p_ref,
            partials,
            numel // batch,
            per_program,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return partials


@torch.library.custom_op("dbcache::probe_diff", mutates_args=())
def _probe_diff_op(
    h_in: torch.Tensor, h_fn: torch.Tensor, p_ref: torch.Tensor, impl: str
) -> torch.Tensor:
    if select(impl, h_in) == "triton":
        return _probe_diff_triton(h_in, h_fn, p_ref)
    return probe_diff_reference(h_in, h_fn, p_ref)


@_probe_diff_op.register_fake
def _(h_in: torch.Tensor, h_fn: torch.Tensor, p_ref: torch.Tensor, impl: str) -> torch.Tensor:
    batch = h_in.shape[0]
    triton_runs = select(impl, h_in) == "triton"
    programs = _partition(h_in.numel(), batch)[1] if triton_runs else 1
    return h_in.new_empty((batch, programs, 2), dtype=torch.float32)


@triton.jit
def _probe_diff_kernel(
    h_in_ptr, h_fn_ptr, p_ref_ptr, partials_ptr, size, per_program, BLOCK: tl.constexpr
):
    program, sample = tl.program_id(0), tl.program_id(1)
    base = sample.to(tl.int64) * size  # numel passes 2**31 for long videos
    start = program.to(tl.int64) * per_program * BLOCK
    num = tl.zeros((BLOCK,), tl.float32)
    den = tl.zeros((BLOCK,), tl.float32)
    for i in range(per_program):
        inside = start + i * BLOCK + tl.arange(0, BLOCK)
        mask = inside < size
        offsets = base + inside
        h_in = tl.load(h_in_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h_fn = tl.load(h_fn_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        p_ref = tl.load(p_ref_ptr + offsets, mask=mask, other=0.0)
        # rounded as commit stores it, so that equal inputs differ by exactly 0
        p = (h_fn - h_in).to(p_ref.dtype).to(tl.float32)
        p_ref = p_ref.to(tl.float32)
        num += tl.abs(p - p_ref)
        den += tl.abs(p_ref)
    out_ptr = partials_ptr + (sample * tl.num_programs(0) + program) * 2
    tl.store(out_ptr, tl.sum(num))
    tl.store(out_ptr + 1, tl.sum(den))
