"""What kernels may take on sm_90, at most, so that it does not creep back."""

import os

LIMITS = {
    "compile_offline.py": {
        # at most 72 registers: seven programs per multiprocessor, see `sums.MAX_PARTIALS`
        "probe_diff-bf16": (72, 352, 5),
        "probe_and_decide-bf16": (72, 1776, 23),
        "block_changes-bf16": (72, 528, 7),
        "probe_and_decide-bf16-tokens": (77, 1912, 30),
        "decide-1024-bf16": (64, 1712, 15),
        "decide_blocks-1024-bf16": (64, 976, 15),
        "block_store-bf16": (60, 336, 8),
        "predict-bf16-k1-encoder": (32, 288, 0),
        "predict-bf16-k8-encoder": (44, 584, 0),
        "commit-bf16-encoder": (40, 152, 0),
        "fp8_commit-bf16-3072": (48, 528, 4),
        "fp8_predict-bf16-3072-k2": (34, 304, 1),
        "fp8_predict-bf16-3072-k8": (64, 656, 1),
    },
    "compile_offline_rows.py": {
        # at most 72 registers: seven programs per multiprocessor, see `sums.MAX_PARTIALS`
        "decide_rows-bf16": (72, 1784, 22),
        "decide_rows-bf16-tokens": (77, 1912, 30),
        "predict_rows-bf16-k8-encoder": (44, 600, 0),
        "commit_rows-bf16-encoder": (40, 184, 0),
        "fp8_predict_rows-bf16-3072-k2": (34, 640, 2),
        "fp8_commit_rows-bf16-3072": (60, 808, 6),
    },
    "compile_offline_parallel.py": {
        "fp8_pack-128-bf16": (85, 728),
        "fp8_unpack-128-bf16": (32, 328),
        "merge_attention-128-bf16": (32, 464),
    },
}
"""Registers, instructions and barriers by script and kernel, of Triton 3.5, 3.6 and 3.9, as
measured. What is not here is not disassembled, which takes longer than to compile it."""

OLDER = {"decide_rows-bf16": (72, 1864, 23)}
"""Where Triton 3.5 and 3.6 (`make tritons`) take more than the newest one."""

COUNTED = frozenset(name for table in LIMITS.values() for name in table)


def check(row: dict, script: str) -> None:
    """Fail where a compiled kernel takes more."""
    got = row["registers"], row["instructions"], row["barriers"]
    most = LIMITS[script][row["kernel"]]
    if "DBCACHE_TRITON" in os.environ:
        most = OLDER.get(row["kernel"], most)
    assert all(x <= limit for x, limit in zip(got, most, strict=False)), (got, most)
