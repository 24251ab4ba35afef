"""The GPU suite says when there is no GPU, and its report fails where a step failed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

from bench import suite_report  # noqa: E402

SUITE = ROOT / "bench" / "gpu_suite.sh"
JUNIT = '<testsuites><testsuite tests="9" failures="{}" errors="0" skipped="2"/></testsuites>'


def test_the_limits_of_the_steps_add_up_to_what_it_says():
    text = SUITE.read_text()
    words = [line.split() for line in text.splitlines()]
    limits = {line[1]: int(line[2]) for line in words if line[:1] == ["step"]}
    assert len(limits) == 11
    minutes, seconds = divmod(sum(limits.values()), 60)
    assert f"# {minutes}:{seconds:02}." in text
    parts = [line.split() for line in re.findall(r'^# +STEPS="([a-z -]+)"$', text, re.MULTILINE)]
    assert sorted([*chain(*parts), "wheels"]) == sorted(limits)
    for part in parts:
        assert sum(limits[name] for name in (*part, "wheels")) <= 585, "each must fit into a call"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("DEVICE", "WHEELS")}
    done = subprocess.run(
        ["bash", str(SUITE), str(tmp_path / "out")],
        env=environment | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr


@pytest.fixture
def report(tmp_path, capsys):
    """Return a function that runs the report on steps: its status, its table and its JSON."""

    def run(*steps: tuple[str, int]) -> tuple[int, str, dict]:
        lines = (f"{name}\t{status}\t3\t60\n" for name, status in steps)
        (tmp_path / "steps.tsv").write_text("".join(lines))
        results = tmp_path / "results.json"
        status = suite_report.main([str(tmp_path), "--device", "cpu", "--json", str(results)])
        return status, capsys.readouterr().out, json.loads(results.read_text())

    return run


def test_report_names_what_was_left_out(tmp_path, report):
    (tmp_path / "kernel-tests.xml").write_text(JUNIT.format(0))
    (tmp_path / "left_out.tsv").write_text("sanitizer\tcompute-sanitizer is not installed\n")
    status, table, results = report(("kernel-tests", 0))
    assert status == 0
    assert re.search(r"sanitizer +- +left out: compute-sanitizer is not installed", table)
    assert results["left_out"] == {"sanitizer": "compute-sanitizer is not installed"}


def test_report_merges_what_the_steps_left(tmp_path, report):
    (tmp_path / "kernel-tests.xml").write_text(JUNIT.format(0))
    (tmp_path / "overhead.json").write_text('{"rows": [1]}')
    status, table, results = report(("kernel-tests", 0), ("overhead", 0))
    assert status == 0
    assert "7 passed, 2 skipped" in table
    assert results["overhead"] == {"rows": [1]}
    assert results["about"]["torch"] == torch.__version__
    assert [step["passed"] for step in results["steps"]] == [True, True]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (("kernel-tests", 1), "6 passed, 1 failed"),
        (("kernel-tests", 124), "ended at its limit"),
        (("runtime-tests", 0), "no result"),
        (("overhead", 0), "no overhead.json"),
        (("sanitizer", 0), "no result"),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_report_fails_where_a_step_failed_or_left_nothing(tmp_path, report, step, said):
    (tmp_path / "kernel-tests.xml").write_text(JUNIT.format(1))
    status, table, results = report(step)
    assert status == 1
    assert "FAILED" in table
    assert said in table
    assert not results["steps"][0]["passed"]
