"""Kernels are compiled once, not anew for each resolution and step."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("count_variants.py")
ROOT = SCRIPT.parents[2]
EXPECTED = {
    "_probe_diff_kernel": 2,  # whole, by token
    "_probe_and_decide_kernel": 2,
    "_decide_rows_kernel": 3,  # and by the plan alone
    "_decide_kernel": 3,  # nothing was measured, up to 128 partial sums, more
    "_transformation_rate_kernel": 2,  # up to 128 partial sums, more
    "_decide_blocks_kernel": 2,
    "_fp8_kernel": 4,  # packs, unpacks; each with and without fp8
}
"""Variants of the kernels that have more than one."""


def test_ten_resolutions_and_fifty_steps_compile_each_kernel_once_and_as_offline():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    variants, wrong = json.loads(done.stdout).values()
    assert len(variants) == 24  # of 26 kernels; two weigh snapshots and take no numbers
    assert {name: n for name, n in variants.items() if n != 1} == EXPECTED
    assert wrong == []
