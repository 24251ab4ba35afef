"""The table of ops that `bench.kernels` times. A new op is a new row, in one of the two files."""

from __future__ import annotations

from bench.cache_ops import CACHE_OPS
from bench.kernel_op import KernelOp
from bench.parallel_ops import PARALLEL_OPS

OPS: dict[str, KernelOp] = {op.name: op for op in (*CACHE_OPS, *PARALLEL_OPS)}
