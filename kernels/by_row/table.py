"""The lanes of the rows of a batch, and the table of their addresses that kernels read.

Each row belongs to a lane, whose tensors were allocated by themselves. A launch for all rows takes
tensors of the whole batch, and of the lanes a table in device memory: a line per row, an int64
address per tensor, 0 for one that is missing. A program finds the line of its row, makes pointers
of the addresses, and goes on as the kernel for one lane does.

Tensors of a lane begin at multiples of 16 bytes. Kernels are told so (`tl.multiple_of`), or they
could not load 16 bytes at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.constants import Constants
from dbcache.kernels.common.lane_state import CACHED, LANE, LaneState, State
from dbcache.kernels.common.select import invalid

# entries of a line: those of `LaneState.arguments`, and the buffers of a `Row`
COUNTERS, VALUES, LIMITS, THRESHOLDS, PLAN, TRACE_REASON, TRACE_DIFF, CAPACITY = range(8)
P_REF, RING, ENCODER_RING, SCALES, ENCODER_SCALES = range(8, 13)
COLUMNS = 16

TABLE = Constants(globals())
"""The constants above, for kernels."""

KINDS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.uint8: tl.uint8,
}
"""Triton's names of what buffers may hold."""

Form = tuple[Any, ...]


class Row(NamedTuple):
    """What the lane of one row keeps: tensors of one sample, (1, ...), as the ops for a lane take.

    Attributes:
        state: of the lane.
        p_ref: probe residual of its last full step, (1, ...); None: it has none yet.
        ring: its snapshots, (K, 1, ...); None: it has none yet.
        encoder_ring: of the encoder states, (K, 1, ...).
        scales: of an fp8 `ring`.
        encoder_scales: of an fp8 `encoder_ring`.
    """

    state: LaneState
    p_ref: Tensor | None = None
    ring: Tensor | None = None
    encoder_ring: Tensor | None = None
    scales: Tensor | None = None
    encoder_scales: Tensor | None = None

    def form(self) -> Form:
        """Return the shapes and dtypes: rows of a launch share them."""
        return tuple([None if x is None else (x.shape, x.dtype) for x in self[1:]])

    def addresses(self) -> tuple[int, ...]:
        """Return the line of the table."""
        buffers = [0 if x is None else x.data_ptr() for x in self[1:]]
        return (*self.state.arguments(), *buffers)

    def is_cached(self) -> bool:
        """Return the decision of the latest step, read on the host."""
        return bool(self.state.counters.tolist()[CACHED])


class Rows:
    """The lanes of the rows of a batch, for the ops by row.

    Args:
        rows: one per row of the batch, in order; None for a row that the ops leave alone.
        known: holds the table from call to call, for as long as no address changes; {} at first.

    Attributes:
        form: shapes and dtypes that the rows share.

    Raises:
        ValueError: there is no row, they differ in shapes or dtypes, or a buffer is not contiguous
            or does not begin at a multiple of 16 bytes.
    """

    def __init__(self, rows: Sequence[Row | None], known: dict[Any, Tensor] | None = None) -> None:
        self.rows = rows
        self._known = {} if known is None else known
        present = [row for row in rows if row is not None]
        if not present:
            raise invalid("Rows", "at least one row must have a lane", rows)
        self.first, self.form = present[0], present[0].form()
        lines = tuple([None if row is None else row.addresses() for row in rows])
        self._key = self.form, lines
        self._table = self._known.get(self._key)
        if self._table is None:
            self._check(present)

    def _check(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.form() != self.form:
                must = "the lanes of all rows must share shapes and dtypes"
                raise invalid("Rows", must, self.form, row.form())
            for x in row[1:]:
                if x is not None and not (x.is_contiguous() and x.data_ptr() % 16 == 0):
                    must = "buffers must be contiguous, from a multiple of 16 bytes on"
                    raise invalid("Rows", must, x.stride(), x.data_ptr())

    def __len__(self) -> int:
        return len(self.rows)

    def each(self) -> Iterator[tuple[slice, Row]]:
        """Yield the rows that have a lane, each with its place in the batch."""
        for index, row in enumerate(self.rows):
            if row is not None:
                yield slice(index, index + 1), row

    def check(self, op: str, x: Tensor) -> Row:
        """Raise a ValueError unless the batch `x` has a row per lane; return the first lane."""
        device = self.first.state.counters.device
        if x.ndim == 0 or len(x) != len(self.rows) or x.device != device:
            must = f"the batch must have {len(self.rows)} rows, as many as there are, on {device}"
            raise invalid(op, must, tuple(x.shape), x.device)
        return self.first

    def table(self) -> Tensor:
        """Return the table on the device, int64 (B, COLUMNS); copied if an address has changed."""
        if self._table is None:
            none = (0,) * COLUMNS
            lines = [none if x is None else (*x, *none)[:COLUMNS] for x in self._key[1]]
            table = torch.tensor(lines, dtype=torch.int64, device="cpu")
            device = self.first.state.counters.device
            if device.type != "cpu":
                table = table.pin_memory().to(device, non_blocking=True)
            self._known.clear()
            self._known[self._key] = self._table = table
        return self._table


def kind_of(x: Tensor | None) -> Any:
    """Return Triton's name of the dtype of a buffer, None for one that is missing."""
    return None if x is None else KINDS[x.dtype]


@triton.jit
def address(table_ptr, row, ENTRY: tl.constexpr, DTYPE: tl.constexpr):
    """Return the pointer to elements of DTYPE in an entry of a row's line."""
    value = tl.load(table_ptr + row * TABLE.COLUMNS + ENTRY)
    return tl.multiple_of(value.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def has_lane(table_ptr, row):
    """Whether a row takes part in the launch."""
    return tl.load(table_ptr + row * TABLE.COLUMNS) != 0


@triton.jit
def decision_of(table_ptr, row):
    """Return how a row's lane decided its latest step: 1 cached, 0 full, -1 for no lane."""
    counters_ptr = address(table_ptr, row, TABLE.COUNTERS, tl.int32)
    return tl.load(counters_ptr + LANE.CACHED, mask=has_lane(table_ptr, row), other=-1)


@triton.jit
def state_of(table_ptr, row):
    """Return the `State` of a row's lane."""
    return State(
        address(table_ptr, row, TABLE.COUNTERS, tl.int32),
        address(table_ptr, row, TABLE.VALUES, tl.float32),
        address(table_ptr, row, TABLE.LIMITS, tl.int32),
        address(table_ptr, row, TABLE.THRESHOLDS, tl.float32),
        address(table_ptr, row, TABLE.PLAN, tl.int32),
        address(table_ptr, row, TABLE.TRACE_REASON, tl.int32),
        address(table_ptr, row, TABLE.TRACE_DIFF, tl.float32),
        tl.load(table_ptr + row * TABLE.COLUMNS + TABLE.CAPACITY).to(tl.int32),
    )
