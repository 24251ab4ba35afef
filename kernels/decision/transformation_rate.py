"""How much a transformer's output changes per change of its input: EasyCache's rate.

    rate = (sum|v - v'| / sum|x - x'|) / sum|v|

with x, v the input and output of the latest full step and x', v' those of the one before. Then
``rate * sum|x_t - x_{t-1}|`` is the relative change of the output that step t is expected to bring
(EasyCache, arXiv:2507.02860; sums in place of its means, whose sizes cancel).

The lane's state holds the rate on the device, or says what is missing. After a step

    cached                                   RATE stays
    full, RATE is NO_OUTPUT                  RATE becomes ONE_OUTPUT: there is no step before yet
    full, RATE is ONE_OUTPUT or a rate       RATE becomes the rate

so the host need not know how a step was decided, nor how many full ones there were. The sums come
from `probe_diff`, so that all of it is the same, bit for bit, in Python and Triton: float32,
rounded once, in the same order.
"""

import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LANE, LaneState
from dbcache.kernels.common.launches import contiguous
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import Impl
from dbcache.kernels.common.sums import (
    Partials,
    check_partials,
    divide,
    lanes_for,
    relative_l1_of_partials,
    total_sums,
)


def transformation_rate(
    state: LaneState, output_partials: Tensor, input_partials: Tensor, *, impl: Impl = "auto"
) -> None:
    """Update ``state.values[RATE]`` after a step, in place.

    Args:
        state: state of a lane; ``counters[CACHED]`` says whether its latest step was a full one.
        output_partials: ``probe_diff(None, v', v)``: float32 (B, T, 2) with T <= MAX_PARTIALS, on
            the device of `state`. The newer one is the reference, so its size is in it. Any numbers
            where the rate does not follow from it.
        input_partials: ``probe_diff(None, x', x)``, in the same form.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads state and sums on the host, which synchronises if they are on a GPU; Triton
    does not.

    Raises:
        ValueError: the partial sums do not fit.
    """
    for partials in (output_partials, input_partials):
        check_partials("transformation_rate", partials, state.values.device)
    _transformation_rate(impl, state, output_partials, input_partials)


def transformation_rate_reference(
    state: LaneState, output_partials: Tensor, input_partials: Tensor
) -> None:
    """Plain Python, the meaning of `transformation_rate`."""
    values = state.values
    if int(state.counters[ls.CACHED]):
        return
    if float(values[ls.RATE]) == ls.NO_OUTPUT:
        values[ls.RATE] = ls.ONE_OUTPUT
        return
    moved_out, size = total_sums(output_partials.tolist())
    moved_in, _ = total_sums(input_partials.tolist())
    values[ls.RATE] = divide(divide(moved_out, moved_in), size)


@op(transformation_rate_reference, like="state.values", mutates=("values",))
def _transformation_rate(state, output_partials, input_partials):
    sizes = (*output_partials.shape[:2], *input_partials.shape[:2])
    log_lanes, warps = lanes_for(max(sizes[1], sizes[3]))
    _transformation_rate_kernel[(1,)](
        state.counters, state.values, *contiguous(output_partials, input_partials), *sizes,
        LOG_LANES=log_lanes, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["output_samples", "output_programs", "input_samples", "input_programs"]
)
def _transformation_rate_kernel(
    counters_ptr, values_ptr, output_ptr, input_ptr,
    output_samples, output_programs, input_samples, input_programs, LOG_LANES: tl.constexpr,
):  # fmt: skip
    outputs = Partials(output_ptr, output_samples, output_programs)
    inputs = Partials(input_ptr, input_samples, input_programs)
    _, _, moved_out, size = relative_l1_of_partials(outputs, LOG_LANES, 2)
    _, _, moved_in, _ = relative_l1_of_partials(inputs, LOG_LANES, 2)
    rate = tl.div_rn(tl.div_rn(moved_out, moved_in), size)
    before = tl.load(values_ptr + LANE.RATE)
    rate = tl.where(before == LANE.NO_OUTPUT, LANE.ONE_OUTPUT, rate)
    is_full = tl.load(counters_ptr + LANE.CACHED) == 0
    # every warp reads before the first one writes
    tl.debug_barrier()
    tl.store(values_ptr + LANE.RATE, rate, mask=is_full)
