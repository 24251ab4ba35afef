"""How much a transformer's output moves per movement of its input: EasyCache's rate.

    rate = (sum|v - v'| / sum|x - x'|) / sum|v|

with x, v the input and output of the latest full step and x', v' those of the one before. Then
``rate * sum|x_t - x_{t-1}|`` is the relative change of the output that step t is expected to bring
(EasyCache, arXiv:2507.02860; sums in place of its means, whose sizes cancel).

It is kept in the lane's state on the device. The sums come from `probe_diff`, so that all of it is
the same, bit for bit, in Python and Triton: float32, rounded once, in the same order.
"""

import torch
import triton
import triton.language as tl

from dbcache.kernels import lane_state as ls
from dbcache.kernels._select import Impl, invalid, is_traced, select
from dbcache.kernels.probe_diff import MAX_PARTIALS
from dbcache.kernels.sums import divide, total_of_partials, total_sums


def transformation_rate(
    values: torch.Tensor,
    output_partials: torch.Tensor,
    input_partials: torch.Tensor,
    *,
    impl: Impl = "auto",
) -> None:
    """Store the rate in ``values[RATE]``, in place.

    Args:
        values: float32 (NUM_VALUES,), of a `LaneState`.
        output_partials: ``probe_diff(None, v', v)``: float32 (B, T, 2) with T <= MAX_PARTIALS, on
            the device of `values`. The newer one is the reference, so its size is in it.
        input_partials: ``probe_diff(None, x', x)``, in the same form.
        impl: ``"triton"``, ``"reference"`` (Python on the host, any device), or ``"auto"``, which
            takes Triton for tensors on a GPU. An implementation asked for by name never falls back.

    The reference reads the sums on the host, which synchronises if they are on a GPU; Triton does
    not.

    Raises:
        ValueError: the tensors do not fit.
    """
    if values.shape != (ls.NUM_VALUES,) or values.dtype != torch.float32:
        must = f"values must be float32 ({ls.NUM_VALUES},)"
        raise invalid("transformation_rate", must, values.dtype, tuple(values.shape))
    for partials in (output_partials, input_partials):
        fits = partials.ndim == 3 and partials.shape[2] == 2 and partials.shape[1] <= MAX_PARTIALS
        if not fits or partials.dtype != torch.float32 or partials.device != values.device:
            must = f"partials must be float32 (B, T, 2) with T <= {MAX_PARTIALS} on {values.device}"
            got = (tuple(partials.shape), partials.dtype, partials.device)
            raise invalid("transformation_rate", must, *got)
    if is_traced(values):
        _transformation_rate_op(values, output_partials, input_partials, impl)
    elif select(impl, values) == "triton":
        _transformation_rate_triton(values, output_partials, input_partials)
    else:
        transformation_rate_reference(values, output_partials, input_partials)


def transformation_rate_reference(
    values: torch.Tensor, output_partials: torch.Tensor, input_partials: torch.Tensor
) -> None:
    """Plain Python, the meaning of `transformation_rate`."""
    moved_out, size = total_sums(output_partials.tolist())
    moved_in, _ = total_sums(input_partials.tolist())
    values[ls.RATE] = divide(divide(moved_out, moved_in), size)


def _transformation_rate_triton(
    values: torch.Tensor, output_partials: torch.Tensor, input_partials: torch.Tensor
) -> None:
    sizes = (*output_partials.shape[:2], *input_partials.shape[:2])
    log_lanes = max(sizes[1] - 1, sizes[3] - 1, 0).bit_length()
    with torch.cuda.device_of(values):
        _transformation_rate_kernel[(1,)](
            values, output_partials.contiguous(), input_partials.contiguous(), *sizes,
            LOG_LANES=log_lanes, num_warps=1 if log_lanes < 8 else 4, enable_fp_fusion=False,
        )  # fmt: skip


@torch.library.custom_op("dbcache::transformation_rate", mutates_args=("values",))
def _transformation_rate_op(
    values: torch.Tensor, output_partials: torch.Tensor, input_partials: torch.Tensor, impl: str
) -> None:
    if select(impl, values) == "triton":
        _transformation_rate_triton(values, output_partials, input_partials)
    else:
        transformation_rate_reference(values, output_partials, input_partials)


_RATE = tl.constexpr(ls.RATE)


@triton.jit
def _transformation_rate_kernel(
    values_ptr,
    output_ptr,
    input_ptr,
    output_samples,
    output_programs,
    input_samples,
    input_programs,
    LOG_LANES: tl.constexpr,
):
    moved_out, size = total_of_partials(output_ptr, output_samples, output_programs, LOG_LANES, 2)
    moved_in, _ = total_of_partials(input_ptr, input_samples, input_programs, LOG_LANES, 2)
    tl.store(values_ptr + _RATE, tl.div_rn(tl.div_rn(moved_out, moved_in), size))
