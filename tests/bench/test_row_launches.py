"""A batch whose samples decide for themselves takes two launches per step, however many they are.

In a process of its own: here Triton interprets.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
from bench.row_launches import measure
found = {key: launches for key, (launches, _) in measure(3, steps=12).items()}
for kind in ("full", "cached"):
    assert found["mean", kind] == found["each", kind] == 2, found
    assert found["one by one", kind] == 2 * 3, found
"""


def test_as_many_launches_for_all_rows_as_for_the_batch():
    unset = ("TRITON_INTERPRET", "DBCACHE_KERNELS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
