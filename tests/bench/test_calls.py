"""A cached step makes no more Python calls into the package than it may, in no more files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

from bench import calls  # noqa: E402

BOUNDS = {
    # target, step: calls and files outside kernels/, calls and files of all
    ("transformer", "cached"): (38, 6, 70, 15),
    ("transformer", "full"): (42, 7, 76, 16),
    ("pipeline", "cached"): (67, 13, 99, 22),
    ("pipeline", "full"): (70, 14, 105, 23),
}
"""Upper bounds, to be lowered as the package gets simpler."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return the table and the JSON of one run of the script."""
    file = tmp_path_factory.mktemp("calls") / "calls.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.run", "calls", "--functions", "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())["calls"]


@pytest.mark.parametrize(("target", "kind"), BOUNDS)
def test_calls_of_a_step_stay_within_bounds(measured, target, kind):
    table, counts = measured
    by_file = counts[target][kind]
    outside = {file: n for file, n in by_file.items() if not file.startswith(calls.KERNELS)}
    got = sum(outside.values()), len(outside), sum(by_file.values()), len(by_file)
    assert all(n <= most for n, most in zip(got, BOUNDS[target, kind], strict=True)), (got, table)


@pytest.mark.parametrize("target", calls.TARGETS)
def test_kinds_of_steps_are_told_apart(measured, target):
    _, counts = measured
    assert counts[target]["cached"]["kernels/decision/probe_and_decide.py"]
    assert counts[target]["full"]["kernels/prediction/commit.py"]
    assert "kernels/prediction/commit.py" not in counts[target]["cached"]


def test_listed_calls_are_those_of_the_table(measured):
    table, counts = measured
    _, *lists = table.split("-- ")
    assert len(lists) == len(BOUNDS)
    listed = {tuple(text.split("\n")[0].split(", ")): text.splitlines()[1:] for text in lists}
    for kind, target in listed:
        assert len(listed[kind, target]) == sum(counts[target][kind].values())


def test_other_packages_do_not_count():
    def named(module):
        scope = {"__name__": module}
        exec("def f(): pass", scope)
        return scope["f"]

    recorder = calls.Recorder()
    with recorder.on():
        for module in ("torch", "dbcache.kernels.commit", "dbcached.lanes", "dbcache.lanes.lane"):
            named(module)()
    recorder.end_step()
    named("dbcache.lanes.lane")()
    recorder.end_step()
    first, second = recorder.steps
    assert [module for module, _ in first.calls if "<module>" not in _] == [
        "dbcache.kernels.commit",
        "dbcache.lanes.lane",
    ]
    assert not second.calls


def test_a_threshold_without_full_steps_is_an_error():
    steps = [calls.Step(())] * 6
    with pytest.raises(RuntimeError, match=r"must be a full step.*\[4, 5\] of 6"):
        calls.most_calls(steps, [4, 5])
