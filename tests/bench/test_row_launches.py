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
for kind, alone in (("full", 2), ("cached", 1)):  # alone, a reused residual needs no launch
    assert found["each", kind] == 2, found
    assert found["mean", kind] == alone, found
    assert found["one by one", kind] == alone * 3, found
"""


def test_all_rows_take_two_launches():
    unset = ("TRITON_INTERPRET", "DBCACHE_KERNELS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
