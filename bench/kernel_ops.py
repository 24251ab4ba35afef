"""The table of ops that `bench.kernels` times. A new op is a new row, in one of the files."""

from __future__ import annotations

from bench.block_ops import BLOCK_OPS
from bench.cache_ops import CACHE_OPS
from bench.kernel_op import KernelOp
from bench.parallel_ops import PARALLEL_OPS
from bench.predictor_ops import PREDICTOR_OPS
from bench.row_ops import ROW_OPS

_ROWS = (*CACHE_OPS, *ROW_OPS, *PREDICTOR_OPS, *BLOCK_OPS, *PARALLEL_OPS)
OPS: dict[str, KernelOp] = {op.name: op for op in _ROWS}
