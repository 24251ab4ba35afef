"""Launches that follow a plan are those that Triton's own dispatch makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("plans_in_stub.py")
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_second_call_of_each_form_skips_dispatch_with_the_same_arguments(found):
    rows = found["rows"]
    assert len(rows) == 41
    assert [row["name"] for row in rows if not (row["same"] and row["direct"])] == []


def test_plans_are_forgotten_with_the_environment_and_the_tuned_choices(found):
    assert found["before"] > 20
    assert found["after"] == 0


WHAT = ["unaligned", "transposed", "checked", "another ring", "gone", "grown", "outgrown"]


@pytest.mark.parametrize("what", WHAT)
def test_other_tensors_go_through_the_checks_and_triton(found, what):
    assert found["rest"][what]
