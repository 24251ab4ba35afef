"""Store a full step's residuals, for all rows of a batch whose lanes decided to run in full.

    p_ref_r            := h_fn[r] - h_in[r]         where counters_r[CACHED] is 0
    ring_r[slot_r]     := h_out[r] - h_fn[r]

`commit` of each such row into the buffers of its own lane, bit for bit, in one launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.by_row.table import TABLE, Row, Rows, address, decision_of, kind_of
from dbcache.kernels.common.e4m3 import tiles
from dbcache.kernels.common.launches import contiguous, elementwise
from dbcache.kernels.common.plans import Plans
from dbcache.kernels.common.select import Impl, select
from dbcache.kernels.prediction.commit import (
    _commit_fp8_kernel,
    _commit_kernel,
    check_commit,
    commit_reference,
    fp8_tile,
)


def commit_rows(
    h_in: Tensor | None,
    h_fn: Tensor,
    h_out: Tensor,
    rows: Rows,
    encoder_fn: Tensor | None = None,
    encoder_out: Tensor | None = None,
    *,
    replace: bool = False,
    impl: Impl = "auto",
) -> None:
    """Do what `commit` does for each row of a batch whose latest step is a full one.

    Args:
        h_in: activations before the probe blocks, (B, ...), float32, float16 or bfloat16. Any
            strides; copied first where not contiguous. None: `h_fn` itself is stored as P_ref.
        h_fn: activations between the probe blocks and the skippable ones, same shape and dtype.
        h_out: activations after the skippable blocks, same shape and dtype.
        rows: B lanes, whose latest step was decided; what they have of `p_ref`, `ring`, `scales`
            is written. Without `p_ref`, `h_in` must be None.
        encoder_fn: second stream, (B, ...) of any size of its own, with an `encoder_ring` in
            `rows`; None: it is not stored.
        encoder_out: as `h_out`, for the encoder states.
        replace: store `h_out` itself, for rings that hold outputs rather than residuals.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    The reference reads the decisions on the host, which synchronises if they are on a GPU; Triton
    does not.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if select(impl, h_fn) == "reference":
        _check(h_in, h_fn, h_out, rows, encoder_fn, encoder_out)
        commit_rows_reference(h_in, h_fn, h_out, rows, encoder_fn, encoder_out, replace)
        return
    tensors = (h_fn, h_out, rows.table(), h_in, encoder_fn, encoder_out)
    found = LAUNCHES.find(impl, (replace, rows.form, h_fn.shape), tensors)
    if found is not None:
        found[0].launch(*found[1])
        return
    _check(h_in, h_fn, h_out, rows, encoder_fn, encoder_out)
    with torch.cuda.device_of(h_fn):
        _launch(tensors, rows, replace)


def commit_rows_reference(
    h_in: Tensor | None,
    h_fn: Tensor,
    h_out: Tensor,
    rows: Rows,
    encoder_fn: Tensor | None,
    encoder_out: Tensor | None,
    replace: bool,
) -> None:
    """Plain PyTorch, the meaning of `commit_rows`."""
    for at, row in rows.each():
        if not row.is_cached():
            streams = _at(at, h_fn, h_out, h_in, encoder_fn, encoder_out)
            commit_reference(*(streams, *_stored(row), replace))


def _stored(row: Row) -> Any:
    """Return what `commit` writes for a row, in its order."""
    state, p_ref, ring, *rest = row
    return ring, state.counters, p_ref, *rest


def _at(at: slice, *streams: Tensor | None) -> list[Any]:
    """Return the rows `at` of streams; None stays None."""
    return [None if x is None else x[at] for x in streams]


def _check(h_in, h_fn, h_out, rows, encoder_fn, encoder_out):
    """Raise a ValueError unless the batch fits the first lane, as all others do."""
    first = rows.check("commit_rows", h_fn)
    if first.ring is None:
        raise ValueError("commit_rows: the lanes must have rings, got None")
    for x in (h_in, h_out, encoder_fn, encoder_out):
        if x is not None:
            rows.check("commit_rows", x)
    streams = _at(slice(0, 1), h_fn, h_out, h_in, encoder_fn, encoder_out)
    check_commit("commit_rows", streams, *_stored(first))


LAUNCHES = Plans()


def _launch(tensors, rows, replace):
    h_fn, h_out, table, h_in, encoder_fn, encoder_out = tensors
    first = rows.first
    h_fn, h_out, h_in = contiguous(h_fn, h_out, h_in)
    encoder_fn, encoder_out = contiguous(encoder_fn, encoder_out)
    streams = h_fn[:1], None if encoder_fn is None else encoder_fn[:1]
    if first.scales is None:
        kernel, (parts, tail, warps) = _commit_rows_kernel, elementwise("commit", *streams)
    else:
        kernel, (parts, tail, warps) = _commit_rows_fp8_kernel, tiles(*streams, fp8_tile)
    if not parts:
        return
    tail |= {"REPLACE": replace, "P_REF": kind_of(first.p_ref)}
    if first.scales is None:
        tail |= {"RING": kind_of(first.ring), "ENCODER_RING": kind_of(first.encoder_ring)}
    given = (h_fn, h_out, table, h_in, encoder_fn, encoder_out)
    LAUNCHES.launch(
        (replace, rows.form, h_fn.shape), tensors, (), kernel, (parts, len(rows)), given, (), tail,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks"])
def _commit_rows_kernel(
    h_fn_ptr, h_out_ptr, table_ptr, h_in_ptr, encoder_fn_ptr, encoder_out_ptr,
    size, blocks, encoder_size, BLOCK: tl.constexpr, REPLACE: tl.constexpr, P_REF: tl.constexpr,
    RING: tl.constexpr, ENCODER_RING: tl.constexpr,
):  # fmt: skip
    """A row of the grid is one of the batch: what `_commit_kernel` is for a lane."""
    row = tl.program_id(1)
    if decision_of(table_ptr, row) == 0:
        start = row.to(tl.int64) * size
        p_ref_ptr = None
        if P_REF is not None:
            p_ref_ptr = address(table_ptr, row, TABLE.P_REF, P_REF)
        if h_in_ptr is not None:
            h_in_ptr += start
        encoder_ring_ptr = None
        if encoder_fn_ptr is not None:
            encoder_ring_ptr = address(table_ptr, row, TABLE.ENCODER_RING, ENCODER_RING)
            encoder_fn_ptr += row.to(tl.int64) * encoder_size
            encoder_out_ptr += row.to(tl.int64) * encoder_size
        _commit_kernel(
            h_fn_ptr + start, h_out_ptr + start, h_in_ptr, encoder_fn_ptr, encoder_out_ptr,
            address(table_ptr, row, TABLE.RING, RING),
            address(table_ptr, row, TABLE.COUNTERS, tl.int32),
            p_ref_ptr, encoder_ring_ptr, None, None,
            size, blocks, encoder_size, BLOCK, REPLACE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "blocks", "encoder_tokens"])
def _commit_rows_fp8_kernel(
    h_fn_ptr, h_out_ptr, table_ptr, h_in_ptr, encoder_fn_ptr, encoder_out_ptr,
    tokens, width, blocks, encoder_tokens, encoder_width, NATIVE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REPLACE: tl.constexpr, P_REF: tl.constexpr,
):  # fmt: skip
    """As `_commit_rows_kernel`, for rings in fp8."""
    row = tl.program_id(1)
    if decision_of(table_ptr, row) == 0:
        start = row.to(tl.int64) * tokens * width
        p_ref_ptr = None
        if P_REF is not None:
            p_ref_ptr = address(table_ptr, row, TABLE.P_REF, P_REF)
        if h_in_ptr is not None:
            h_in_ptr += start
        encoder_ring_ptr = None
        encoder_scales_ptr = None
        if encoder_fn_ptr is not None:
            encoder_ring_ptr = address(table_ptr, row, TABLE.ENCODER_RING, tl.uint8)
            encoder_scales_ptr = address(table_ptr, row, TABLE.ENCODER_SCALES, tl.float32)
            encoder_fn_ptr += row.to(tl.int64) * encoder_tokens * encoder_width
            encoder_out_ptr += row.to(tl.int64) * encoder_tokens * encoder_width
        _commit_fp8_kernel(
            h_fn_ptr + start, h_out_ptr + start, h_in_ptr, encoder_fn_ptr, encoder_out_ptr,
            address(table_ptr, row, TABLE.RING, tl.uint8),
            address(table_ptr, row, TABLE.COUNTERS, tl.int32), p_ref_ptr, encoder_ring_ptr,
            address(table_ptr, row, TABLE.SCALES, tl.float32), encoder_scales_ptr,
            tokens, width, blocks, encoder_tokens, encoder_width, NATIVE, ROWS, COLUMNS, REPLACE,
        )  # fmt: skip
