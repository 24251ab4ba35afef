"""As test_offline_compile.py, for the kernels by row: pointers from a table cost no vectors."""

import os
import re

import compile_limits as limits
import pytest

NVIDIA = ("cuda:90",) if os.environ.get("DBCACHE_TRITON") else ("cuda:80", "cuda:90", "cuda:100")
AMD = () if os.environ.get("DBCACHE_TRITON") else ("hip:gfx942",)
SCRIPT = "compile_offline_rows.py"

# the first test of a target compiles all of it, where nothing is in the cache
pytestmark = pytest.mark.timeout(1200)


def moved(row):
    """Return the 16-byte loads and stores per thread: those of the kernel for one lane."""
    name = row["kernel"]
    streams = 2 if "encoder" in name else 1
    if name.startswith("fp8"):  # both streams: two vectors each, or one of codes
        return (2 * (2 + 2), 2 * 2) if "predict" in name else (2 * (3 + 2), 2 + 2)
    per_tensor = row["per_thread"] * (4 if "fp32" in name else 2) // 16
    if name.startswith("decide"):
        return 3 * per_tensor, 0
    if name.startswith("plan"):
        return 0, 0
    if name.startswith("predict"):
        slots = int(re.search(r"-k(\d)", name).group(1))
        return streams * (slots + 1) * per_tensor, streams * per_tensor
    return (3 + 2 * (streams - 1)) * per_tensor, (1 + streams) * per_tensor


@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
def test_no_kernel_spills_or_uses_local_memory(compiled, target):
    rows = compiled(SCRIPT, target)
    assert len(rows) >= 8
    assert [row["kernel"] for row in rows if row["local"] or row["spilled"]] == []


@pytest.mark.parametrize("target", NVIDIA)
def test_each_tensor_is_moved_in_vectors_of_16_bytes(compiled, target):
    for row in compiled(SCRIPT, target):
        loads, stores = moved(row)
        wide = row["wide_loads"]
        if "tokens" in row["kernel"]:  # the four partial sums of a program are loaded so, too
            wide = min(wide, loads)
        assert (wide, row["wide_stores"]) == (loads, stores), row["kernel"]


@pytest.mark.parametrize("target", AMD)
def test_amd_moves_vectors_of_16_bytes_too(compiled, target):
    for row in compiled(SCRIPT, target):
        if (row["per_thread"] or 0) >= 8 and not row["kernel"].startswith("plan"):
            assert row["wide_loads"] >= 2, row["kernel"]
            assert row["wide_stores"] >= (not row["kernel"].startswith("decide")), row["kernel"]


@pytest.mark.parametrize("target", NVIDIA)
def test_decisions_do_not_fuse_multiplications_and_additions(compiled, target):
    rows = [r for r in compiled(SCRIPT, target) if r["kernel"].startswith(("decide", "plan"))]
    assert len(rows) >= 3  # whole, by token, by the plan alone
    assert not any(row["fma"] for row in rows)


@pytest.mark.parametrize("name", limits.LIMITS[SCRIPT])
def test_kernels_take_no_more_registers_and_instructions_than_they_did(compiled, name):
    (row,) = [row for row in compiled(SCRIPT, "cuda:90") if row["kernel"] == name]
    limits.check(row, SCRIPT)
