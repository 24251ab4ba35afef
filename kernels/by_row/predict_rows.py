"""The output of the skipped blocks, for all rows of a batch whose lanes decided to cache.

    out[r] = h[r] + sum_j weights_r[j] * ring_r[j]       where counters_r[CACHED] is 1

`predict` of each such row with the ring and the weights of its own lane, bit for bit, in one
launch. The other rows are not written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.by_row.table import TABLE, Row, Rows, address, decision_of, kind_of
from dbcache.kernels.common.checks import check_tensor
from dbcache.kernels.common.e4m3 import tiles
from dbcache.kernels.common.lane_state import LANE
from dbcache.kernels.common.launches import contiguous, elementwise
from dbcache.kernels.common.plans import Plans
from dbcache.kernels.common.select import Impl, select
from dbcache.kernels.prediction.predict import (
    _predict_fp8_kernel,
    _predict_kernel,
    check_predict,
    fp8_tile,
    predict_reference,
)


def predict_rows(
    h: Tensor,
    rows: Rows,
    out: Tensor,
    encoder: Tensor | None = None,
    encoder_out: Tensor | None = None,
    *,
    replace: bool = False,
    impl: Impl = "auto",
) -> None:
    """Write what `predict` returns for each row of a batch whose latest step is a cached one.

    Args:
        h: activations before the skipped blocks, (B, ...), float32, float16 or bfloat16. Any
            strides; copied first where not contiguous.
        rows: B lanes, with rings (K, 1, ...), whose latest step was decided.
        out: written: shape, dtype and device of `h`, contiguous. It must not overlap the rest.
        encoder: second stream, (B, ...) of any size of its own, with an `encoder_ring` in `rows`.
        encoder_out: as `out`, for `encoder`.
        replace: leave `h` out of the sum, for rings that hold outputs rather than residuals.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the decisions on the host, which synchronises if they are on a GPU; Triton
    does not.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if select(impl, h) == "reference":
        _check(h, rows, out, encoder, encoder_out)
        predict_rows_reference(h, rows, out, encoder, encoder_out, replace)
        return
    tensors = (h, out, rows.table(), encoder, encoder_out)
    found = LAUNCHES.find(impl, (replace, rows.form, h.shape), tensors)
    if found is not None:
        found[0].launch(*found[1])
        return
    _check(h, rows, out, encoder, encoder_out)
    with torch.cuda.device_of(h):
        _launch(tensors, rows, replace)


def predict_rows_reference(
    h: Tensor,
    rows: Rows,
    out: Tensor,
    encoder: Tensor | None,
    encoder_out: Tensor | None,
    replace: bool,
) -> None:
    """Plain PyTorch, the meaning of `predict_rows`."""
    for at, row in rows.each():
        if row.is_cached():
            given, made = [None if x is None else x[at] for x in (encoder, encoder_out)]
            predict_reference(out[at], made, [h[at], given], _stored(row), replace)


def _stored(row: Row) -> list[Tensor | None]:
    """Return what `predict` reads of a row, in its order."""
    state, _, ring, encoder_ring, *scales = row
    return [ring, state.weights, encoder_ring, state.encoder_weights, *scales]


def _check(
    h: Tensor, rows: Rows, out: Tensor, encoder: Tensor | None, encoder_out: Tensor | None
) -> None:
    """Raise a ValueError unless the batch fits the first lane, as all others do."""
    who = "predict_rows"
    first = rows.check(who, h)
    if first.ring is None or (encoder is None) != (encoder_out is None):
        raise ValueError(f"{who}: rings, and an output per stream, must be given, got None")
    second = None
    if encoder is not None:
        rows.check(who, encoder)
        second = encoder[:1]
    check_predict(who, [h[:1], second], _stored(first))
    for name, x, made in (("h", h, out), ("encoder", encoder, encoder_out)):
        if x is not None and made is not None:
            form = (x.dtype, x.shape, x.device)
            check_tensor(who, f"the output for {name}", made, *form, contiguous=True)


LAUNCHES = Plans()


def _launch(tensors, rows, replace):
    h, out, table, encoder, encoder_out = tensors
    first = rows.first
    h, encoder = contiguous(h, encoder)
    streams = h[:1], None if encoder is None else encoder[:1]
    slots = first.ring.shape[0]
    if first.scales is None:
        sizes = elementwise("predict", *streams, slots)
        kernel, (parts, tail, warps) = _predict_rows_kernel, sizes
    else:
        kernel, (parts, tail, warps) = _predict_rows_fp8_kernel, tiles(*streams, fp8_tile)
    if not parts:
        return
    tail |= {"K": slots, "REPLACE": replace}
    if first.scales is None:
        kinds = kind_of(first.ring), kind_of(first.encoder_ring)
        tail |= {"RING": kinds[0], "ENCODER_RING": kinds[1]}
    LAUNCHES.launch(
        (replace, rows.form, h.shape), tensors, (), kernel, (parts, len(rows)),
        (h, out, table, encoder, encoder_out), (), tail, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks"])
def _predict_rows_kernel(
    h_ptr, out_ptr, table_ptr, encoder_ptr, encoder_out_ptr, size, blocks, encoder_size,
    BLOCK: tl.constexpr, K: tl.constexpr, REPLACE: tl.constexpr, RING: tl.constexpr,
    ENCODER_RING: tl.constexpr,
):  # fmt: skip
    """A row of the grid is one of the batch: what `_predict_kernel` is for a lane."""
    row = tl.program_id(1)
    if decision_of(table_ptr, row) == 1:
        values_ptr = address(table_ptr, row, TABLE.VALUES, tl.float32)
        start = row.to(tl.int64) * size
        encoder_ring_ptr = None
        if encoder_ptr is not None:
            encoder_ring_ptr = address(table_ptr, row, TABLE.ENCODER_RING, ENCODER_RING)
            encoder_ptr += row.to(tl.int64) * encoder_size
            encoder_out_ptr += row.to(tl.int64) * encoder_size
        _predict_kernel(
            out_ptr + start, encoder_out_ptr, h_ptr + start, encoder_ptr,
            address(table_ptr, row, TABLE.RING, RING), values_ptr + LANE.WEIGHTS,
            encoder_ring_ptr, values_ptr + LANE.ENCODER_WEIGHTS, None, None,
            size, blocks, encoder_size, BLOCK, K, REPLACE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "blocks", "encoder_tokens"])
def _predict_rows_fp8_kernel(
    h_ptr, out_ptr, table_ptr, encoder_ptr, encoder_out_ptr,
    tokens, width, blocks, encoder_tokens, encoder_width, NATIVE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, REPLACE: tl.constexpr,
):  # fmt: skip
    """As `_predict_rows_kernel`, for rings in fp8."""
    row = tl.program_id(1)
    if decision_of(table_ptr, row) == 1:
        values_ptr = address(table_ptr, row, TABLE.VALUES, tl.float32)
        start = row.to(tl.int64) * tokens * width
        encoder_ring_ptr = None
        encoder_scales_ptr = None
        if encoder_ptr is not None:
            encoder_ring_ptr = address(table_ptr, row, TABLE.ENCODER_RING, tl.uint8)
            encoder_scales_ptr = address(table_ptr, row, TABLE.ENCODER_SCALES, tl.float32)
            encoder_ptr += row.to(tl.int64) * encoder_tokens * encoder_width
            encoder_out_ptr += row.to(tl.int64) * encoder_tokens * encoder_width
        _predict_fp8_kernel(
            out_ptr + start, encoder_out_ptr, h_ptr + start, encoder_ptr,
            address(table_ptr, row, TABLE.RING, tl.uint8), values_ptr + LANE.WEIGHTS,
            encoder_ring_ptr, values_ptr + LANE.ENCODER_WEIGHTS,
            address(table_ptr, row, TABLE.SCALES, tl.float32), encoder_scales_ptr,
            tokens, width, blocks, encoder_tokens, encoder_width, NATIVE, ROWS, COLUMNS,
            K, REPLACE,
        )  # fmt: skip
