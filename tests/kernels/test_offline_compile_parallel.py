"""As test_offline_compile.py, for the kernels that parallelism uses."""

import os

import compile_limits as limits
import pytest

NVIDIA = ("cuda:90",) if os.environ.get("DBCACHE_TRITON") else ("cuda:80", "cuda:90", "cuda:100")
AMD = () if os.environ.get("DBCACHE_TRITON") else ("hip:gfx942",)
SCRIPT = "compile_offline_parallel.py"

# the first test of a target compiles all of it, where nothing is in the cache
pytestmark = pytest.mark.timeout(1200)


def moved(name):
    """Return the 16-byte loads and stores per thread of 128, of values and not of scales."""
    op, width, *dtypes = name.removesuffix("-layout").split("-")
    layout, width = name.endswith("-layout"), int(width)
    sixteenths = {"bf16": 2, "fp16": 2, "fp32": 4}  # of a thread's block of 16 elements
    if op == "merge_attention":  # 2048 elements
        a, b = sixteenths[dtypes[0]], sixteenths[dtypes[-1]]
        return a + b, a
    plain = 2 * sixteenths[dtypes[0]]  # 4096 elements
    # codes of 72 or 40 are in words of 8 bytes, as much as the rows are aligned to
    codes = plain if layout else 2 if width % 16 == 0 else 0
    return (plain, codes) if op == "fp8_pack" else (codes, plain)


@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
def test_no_kernel_spills_or_uses_local_memory(compiled, target):
    rows = compiled(SCRIPT, target)
    assert len(rows) >= 18
    assert [row["kernel"] for row in rows if row["local"] or row["spilled"]] == []


@pytest.mark.parametrize("target", NVIDIA)
def test_each_tensor_is_moved_in_vectors_of_16_bytes(compiled, target):
    for row in compiled(SCRIPT, target):
        assert (row["wide_loads"], row["wide_stores"]) == moved(row["kernel"]), row["kernel"]


@pytest.mark.parametrize("target", AMD)
def test_amd_moves_vectors_of_16_bytes_too(compiled, target):
    for row in compiled(SCRIPT, target):
        loads, stores = moved(row["kernel"])  # by twice as many threads
        got = row["wide_loads"], row["wide_stores"]
        assert got == (loads // 2, stores // 2), row["kernel"]


@pytest.mark.parametrize("name", limits.LIMITS[SCRIPT])
def test_kernels_take_no_more_registers_and_instructions_than_they_did(compiled, name):
    (row,) = [row for row in compiled(SCRIPT, "cuda:90") if row["kernel"] == name]
    limits.check(row, SCRIPT)
