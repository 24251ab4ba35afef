"""Kernels compile for GPUs that are not there, to code that moves 16 bytes per instruction."""

import os
import re

import compile_limits as limits
import pytest

from dbcache.kernels.common.launches import BLOCK, CONFIGS
from dbcache.kernels.common.sums import MAX_PARTIALS

NVIDIA = ("cuda:90",) if os.environ.get("DBCACHE_TRITON") else ("cuda:80", "cuda:90", "cuda:100")
AMD = () if os.environ.get("DBCACHE_TRITON") else ("hip:gfx942",)
TARGETS = NVIDIA + AMD
SCRIPT = "compile_offline.py"

# the first test of a target compiles all of it, where nothing is in the cache
pytestmark = pytest.mark.timeout(1200)


def wide_kernels(compiled, target):
    rows = {row["kernel"]: row for row in compiled(SCRIPT, target)}
    scalar_or_tiled = ("decide", "fp8", "weights")
    return {name: row for name, row in rows.items() if not name.startswith(scalar_or_tiled)}


def hidden_loads(name):
    """Return how many tensors of hidden states a `commit` reads: all but h_in, or all three."""
    return 2 if "hidden" in name or "ring" in name else 3


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_uses_local_memory(compiled, target):
    rows = compiled(SCRIPT, target)
    assert len(rows) >= 11
    assert [row["kernel"] for row in rows if row["local"] or row["spilled"]] == []


@pytest.mark.parametrize("target", NVIDIA)
def test_each_tensor_is_moved_in_vectors_of_16_bytes(compiled, target):
    for name, row in wide_kernels(compiled, target).items():
        per_tensor = row["per_thread"] * (4 if "fp32" in name else 2) // 16
        assert per_tensor >= 1, name
        streams = 2 if "encoder" in name else 1
        replace = "replace" in name
        if name.startswith("probe"):
            loads, stores = 2 if "hidden" in name else 3, 0
        elif name.startswith("fit_recurrence"):
            assert row["wide_loads"] >= 3 * per_tensor, name  # two snapshots, and a loop over more
            continue
        elif name.startswith("block_changes"):
            loads, stores = 4, 0  # the first block's input before the loop, the next one's in it
        elif name.startswith("block_add"):
            loads, stores = 2 * streams, 1  # the streams share the code that stores
        elif name.startswith("block_store"):
            loads, stores = 4 + 2 * (streams - 1), 1 + streams
        elif "predict" in name:
            slots = int(re.search(r"-k(\d)", name).group(1))
            loads, stores = streams * (slots + (not replace)), streams
        else:
            loads = hidden_loads(name) + (streams - 1) * (1 if replace else 2)
            stores = streams + ("ring" not in name)
        expected = (loads * per_tensor, stores * per_tensor)
        wide_loads = row["wide_loads"]
        if name.startswith("probe_and_decide") and "tokens" in name:
            # Triton before 3.7 also loads the partial sums, four per token, in such vectors
            wide_loads = min(wide_loads, loads * per_tensor)
        assert (wide_loads, row["wide_stores"]) == expected, name


@pytest.mark.parametrize("target", NVIDIA)
def test_fp8_codes_and_what_they_stand_for_are_moved_in_vectors_of_16_bytes(compiled, target):
    rows = [r for r in compiled(SCRIPT, target) if r["kernel"].startswith("fp8")]
    assert len(rows) >= 16
    for row in rows:
        name = row["kernel"]
        codes = 2 if "commit" in name and "16384" in name else 1  # vectors per tensor and thread
        values = 2 * codes
        if "fp32" in name:  # 8 elements per thread
            codes = 0
        streams = 2 if "encoder" in name else 1
        if "predict" in name:
            loads, stores = streams * (values + codes * int(name[-1])), streams * values
        else:
            others = (streams - 1) * (1 if "replace" in name else 2)
            loads = values * (hidden_loads(name) + others)
            stores = values * ("ring" not in name) + codes * streams
        assert (row["wide_loads"], row["wide_stores"]) == (loads, stores), name


@pytest.mark.parametrize("target", TARGETS)
def test_every_config_that_tuning_may_choose_is_compiled(compiled, target):
    names = {row["kernel"].rpartition("-block")[::2] for row in compiled(SCRIPT, target)}
    for op, configs in CONFIGS.items():
        start, *tokens = op.split()
        found = {
            suffix
            for name, suffix in names
            if name.startswith(f"{start}-") and name.endswith("tokens") == bool(tokens)
        }
        assert {f"{block}-warps{warps}" for block, warps in configs[1:]} <= found, op


@pytest.mark.parametrize("target", AMD)
def test_amd_moves_vectors_of_16_bytes_too(compiled, target):
    for name, row in wide_kernels(compiled, target).items():
        if row["per_thread"] < 8:  # 512 threads share 2048 elements: 8 bytes of bfloat16 each
            continue
        assert row["wide_loads"] >= 2, name
        no_stores = ("probe", "block_changes", "fit")
        assert row["wide_stores"] >= (not name.startswith(no_stores)), name


@pytest.mark.parametrize("target", TARGETS)
def test_the_input_of_the_next_block_is_loaded_before_the_sums_of_this_one(compiled, target):
    """No load of the device crosses the barriers of a sum."""
    rows = [row for row in compiled(SCRIPT, target) if row["kernel"].startswith("block_changes")]
    assert rows
    assert not any(row["loads_after_sums"] for row in rows)


@pytest.mark.parametrize("target", NVIDIA)
def test_scalar_arithmetic_does_not_fuse_multiplications_and_additions(compiled, target):
    scalar = compiled(SCRIPT, target)
    rows = [row for row in scalar if "decide" in row["kernel"] or "weights" in row["kernel"]]
    assert len(rows) >= 8
    assert not any(row["fma"] for row in rows)


@pytest.mark.parametrize("target", TARGETS)
def test_fp8_is_converted_by_instructions_where_there_are_any(compiled, target):
    rows = [row for row in compiled(SCRIPT, target) if row["kernel"].startswith("fp8")]
    assert {row["e4m3"] for row in rows} == {target in ("cuda:90", "cuda:100")}


@pytest.mark.parametrize("name", limits.LIMITS[SCRIPT])
def test_kernels_take_no_more_registers_and_instructions_than_they_did(compiled, name):
    (row,) = [row for row in compiled(SCRIPT, "cuda:90") if row["kernel"] == name]
    limits.check(row, SCRIPT)


@pytest.mark.parametrize("name", ["probe_diff-bf16", "probe_and_decide-bf16", "block_changes-bf16"])
def test_all_programs_that_measure_run_at_once_on_132_multiprocessors(compiled, name):
    """Of the 65536 registers of each, warps of sm_90 are given 8 per thread at a time."""
    (row,) = [row for row in compiled(SCRIPT, "cuda:90") if row["kernel"] == name]
    registers = -(-row["registers"] // 8) * 8 * BLOCK // row["per_thread"]
    assert 65536 // registers * 132 >= MAX_PARTIALS
