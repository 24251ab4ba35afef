"""`make tritons`, a part of `.ci/run`, compiles the kernels with older Tritons or says why not."""

import os
import re
import shutil
import subprocess

import pytest
from pages import ROOT


def test_the_oldest_triton_that_is_supported_and_the_one_of_torch_2_11_are_compiled_with():
    (compiled,) = re.findall(r"^TRITONS \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (oldest,) = re.findall(r'"triton>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    assert compiled.split() == [f"{oldest}.0", "3.6.0"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_triton_that_cannot_be_had_is_named_and_left_out():
    """Without an index pip finds no wheel; `-o`: .venv is not set up again for this."""
    done = subprocess.run(
        ["make", "-s", "-o", ".venv/.installed", "TRITONS=0.0.1", "tritons"],
        cwd=ROOT,
        env=os.environ | {"PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LEFT OUT: Triton 0.0.1 cannot be had")
    assert "passed" not in done.stdout
    assert not list((ROOT / ".tritons").glob("0.0.1*"))
    assert "tritons" in (ROOT / ".ci" / "run").read_text()
