"""The benchmark of attention over ranks: it runs, and its messages are what they must be."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ranks
def test_measures_each_mode_beside_diffusers(tmp_path: Path) -> None:
    table = tmp_path / "modes.csv"
    options = "--ranks=2 --tokens=64 --heads=2 --repeats=2"
    done = subprocess.run(
        [sys.executable, "bench/run.py", "parallel", *options.split(), f"--csv={table}"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr[:4000]}\n...\n{done.stderr[-2000:]}"
    rows = {row["mode"]: row for row in csv.DictReader(table.open())}
    assert list(rows) == [
        "one rank, all tokens",
        "ulysses",
        "ulysses float8",
        "ring p2p",
        "ring allgather",
        "diffusers ulysses",
    ]
    assert all(float(row["p50 ms"]) > 0 for row in rows.values())
    # q, k, v and the output: half of 32 tokens x 2 heads x 128 in bfloat16 leaves the rank
    assert float(rows["ulysses"]["MB sent"]) == round(4 * 32 * 2 * 128 * 2 / 2 / 1e6, 3)
    # keys and values go to the one other rank
    assert rows["ring p2p"]["MB sent"] == rows["ring allgather"]["MB sent"]
    assert float(rows["ulysses float8"]["MB sent"]) <= 0.53 * float(rows["ulysses"]["MB sent"])
