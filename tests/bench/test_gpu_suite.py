"""The GPU suite keeps to its time, leaves results however it ends, and fails where a step did."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

import bench.run  # noqa: E402
from bench import suite_report  # noqa: E402
from bench.shapes import parse as parse_shape  # noqa: E402

SUITE = ROOT / "bench" / "gpu_suite.sh"
JUNIT = '<testsuites><testsuite tests="9" failures="{}" errors="0" skipped="2"/></testsuites>'
ABOUT = {"device": "CPU of a test", "torch": torch.__version__}


def test_two_calls_fit_into_twelve_minutes_by_their_own_limits():
    text = SUITE.read_text()
    asked = {}
    for call, rest in (("first", "kernel-tests"), ("second", None)):
        (limit,) = re.findall(rf"^{call}\) limit=\$\{{LIMIT:-(\d+)\}} ;;$", text, re.MULTILINE)
        minutes, seconds = divmod(int(limit), 60)
        said = (
            rf"^# +bench/gpu_suite.sh OUTDIR {call} +at most {minutes}:{seconds:02}; ask for (\d+) "
        )
        (asked[call],) = (int(n) * 60 for n in re.findall(said, text, re.MULTILINE))
        assert int(limit) + 10 <= asked[call] - 10, "killed, and packed"
        steps = text.split('if [ "$call" = first ]')[1].split("\nelse\n")[call == "second"]
        limits = dict(re.findall(r"^ +step ([a-z-]+) (\d+) ", steps, re.MULTILINE))
        assert len(limits) >= 4
        assert rest in (None, list(limits)[-1]), "what takes all that is left comes last"
        fixed = sum(int(seconds) for name, seconds in limits.items() if name != rest)
        assert fixed <= int(limit) - 15, "each step finds the time that it may take"
    assert asked == {"first": 480, "second": 240}


COLLECT = """
import json, sys, pytest
for words in json.load(sys.stdin):
    assert pytest.main([*words, "--collect-only"]) == 0
    print("===")
"""
RECORDING_PYTHON = """#!/usr/bin/env bash
case "$*" in
*--about*) echo '{about}' >"$3/about.json" ;;
*suite_report* | "-c import xdist") exec {python} "$@" ;;
*) exec {python} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" >>{file} ;;
esac
"""


@pytest.fixture(scope="module")
def on_a_gpu(tmp_path_factory):
    """Return what each step would run on a GPU: the words after `python -m`, by the step's name."""
    folder = tmp_path_factory.mktemp("suite")
    for name, text in {
        "python": RECORDING_PYTHON.format(
            about=json.dumps(ABOUT), python=sys.executable, file=folder / "commands"
        ),
        "compute-sanitizer": '#!/bin/sh\nshift 2\nexec "$@"\n',
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    own = {"PYTHON": str(folder / "python"), "PATH": path, "DEVICE": "cuda", "LEAST": "0"}
    unset = ("WHEELS", "STEPS", "LIMIT")
    environment = {k: v for k, v in os.environ.items() if k not in unset} | own
    for call in ("first", "second"):
        command = ["bash", str(SUITE), str(folder / "out"), call]
        subprocess.run(command, env=environment, capture_output=True, check=False)
    commands = map(json.loads, (folder / "commands").read_text().splitlines())
    named = {}
    for _, *words in commands:
        (file,) = [word for word in words if word.endswith((".xml", ".json"))]
        named[Path(file).stem] = words
    return named


def test_each_step_for_a_gpu_finds_its_tests(on_a_gpu):
    tests = {name: words[1:] for name, words in on_a_gpu.items() if words[0] == "pytest"}
    files = [word for word in tests.pop("kernel-tests") if word.startswith("tests/")]
    assert 8 <= len(files) < 20, "as many as there is time for"
    assert all((ROOT / file).is_file() for file in files)
    done = subprocess.run(
        [sys.executable, "-c", COLLECT],
        cwd=ROOT,
        input=json.dumps(list(tests.values())),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("===")
    found = {
        name: {line for line in part.splitlines() if "::" in line}
        for name, part in zip(tests, parts, strict=False)
    }
    graphs = [found[f"graphs-{name}"] for name in ("equal", "wait", "rest")]
    assert list(map(len, graphs)) == [4, 5, 25]
    assert len(set.union(*graphs)) == 34, "each runs once"
    assert len(found["sanitizer"] & graphs[0]) == len(found["sanitizer"]) == 1
    assert len(found["together"]) >= 5


@pytest.mark.filterwarnings("ignore:'bench.* found in sys.modules")  # another test's
def test_each_measurement_for_a_gpu_takes_its_options(on_a_gpu, monkeypatch):
    measurements = {name: words for name, words in on_a_gpu.items() if words[0] == "bench.run"}
    assert measurements.keys() == suite_report.RESULTS.keys()
    options, parse = [], argparse.ArgumentParser.parse_args

    def parse_and_leave(parser, *given):
        options.append(parse(parser, *given))
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    for words in measurements.values():
        with pytest.raises(KeyboardInterrupt):
            bench.run.run(words[1], words[2:])
    parsed = dict(zip(measurements, options, strict=True))
    assert {given.device for given in options} == {"cuda"}
    assert all(given.json.name == f"{name}.json" for name, given in parsed.items())
    assert parsed["graphs"].engines == parsed["overhead"].engines == ["dbcache", "cache-dit"]
    assert [parse_shape(name).name for name in parsed["kernels"].shapes] == [
        "flux-1024", "wan-720p", "few-step-512",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("DEVICE", "WHEELS")}
    done = subprocess.run(
        ["bash", str(SUITE), str(tmp_path / "out"), "first"],
        env=environment | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr


@pytest.mark.parametrize("words", [[], ["out"], ["out", "third"]])
def test_wrong_arguments_are_refused(tmp_path, words):
    done = subprocess.run(
        ["bash", str(SUITE), *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "usage: bench/gpu_suite.sh OUTDIR first|second|wheels" in done.stderr
    assert list(tmp_path.iterdir()) == []


FAKE_PYTHON = """#!/usr/bin/env bash
# pytest runs two tests of its own; a measurement leaves its file and goes on for long
case "$*" in
*"-m pytest"*) for word; do case $word in --junitxml=*) xml=$word ;; esac; done
    cd {folder}
    exec {python} -m pytest -q -p no:cacheprovider -c /dev/null "$xml" test_both.py ;;
*"-m bench.run graphs"*) for word; do file=$word; done
    echo '{{"rows": [{{"refused": ""}}]}}' >"$file"
    touch {folder}/measures
    exec {python} -c 'import time; time.sleep({seconds})' ;;
*--about*) echo '{about}' >"$3/about.json" ;;
*) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def suite(tmp_path):
    """Return a function that begins the suite with steps that take as long as a test wants."""

    def begin(steps: str, *, pytest_takes: float, measurement_takes: float, limit: int):
        (tmp_path / "test_both.py").write_text(
            f"import time\ndef test_a(): pass\ndef test_b(): time.sleep({pytest_takes})\n"
        )
        python = tmp_path / "python"
        python.write_text(
            FAKE_PYTHON.format(
                folder=tmp_path,
                python=sys.executable,
                seconds=measurement_takes,
                about=json.dumps(ABOUT),
            )
        )
        python.chmod(0o755)
        options = {"STEPS": steps, "LIMIT": str(limit), "LEAST": "2", "PYTHON": str(python)}
        return subprocess.Popen(
            ["bash", str(SUITE), str(tmp_path / "out"), "first"],
            env=os.environ | options | {"DEVICE": "cpu", "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return begin


def results_of(tmp_path: Path) -> tuple[dict, list[str]]:
    """Return what the suite left: its steps by name, and the names of the packed logs."""
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "logs.tar.gz", "results.json", "summary.txt",
    ]  # fmt: skip
    steps = json.loads((out / "results.json").read_text())["steps"]
    with tarfile.open(out / "logs.tar.gz") as archive:
        return {step["name"]: step for step in steps}, archive.getnames()


def test_results_survive_a_step_that_reaches_its_limit(tmp_path, suite):
    """What passed before the limit is counted, and steps that found no time are named."""
    process = suite("graphs-equal graphs", pytest_takes=600, measurement_takes=0, limit=15)
    said, _ = process.communicate(timeout=120)
    steps, packed = results_of(tmp_path)
    assert process.returncode == 1, said
    assert steps["graphs-equal"]["status"] == 124
    assert steps["graphs-equal"]["detail"] == "ended at its limit; 1 passed"
    assert not steps["graphs-equal"]["passed"]
    assert steps["graphs"]["detail"] == "not begun: no time left"
    assert "logs/graphs.log" not in packed, "`timeout` with less than no time fails alike"
    assert "logs/graphs-equal.xml" in packed
    assert re.search(r"^graphs +FAILED .*no time left$", said, re.MULTILINE)


def test_measurements_survive_their_limit(tmp_path, suite):
    process = suite("graphs", pytest_takes=0, measurement_takes=600, limit=4)
    said, _ = process.communicate(timeout=120)
    steps, packed = results_of(tmp_path)
    assert process.returncode == 1, said
    assert steps["graphs"]["detail"] == "ended at its limit; 1 timed, 0 refused"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["graphs"]["rows"]
    assert "logs/graphs.json" in packed


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_results_survive_a_call_that_is_ended_from_outside(tmp_path, suite, end):
    takes = 600 if end == signal.SIGTERM else 10  # nobody ends the step of one that is killed
    process = suite("graphs-equal graphs", pytest_takes=0, measurement_takes=takes, limit=300)
    for _ in range(600):
        if (tmp_path / "measures").exists():
            break
        time.sleep(0.1)
    process.send_signal(end)
    said, _ = process.communicate(timeout=60)
    steps, packed = results_of(tmp_path)
    assert process.returncode == (143 if end == signal.SIGTERM else -end), said
    assert steps["graphs-equal"]["passed"]
    assert steps["graphs-equal"]["detail"] == "2 passed"
    assert "logs/graphs-equal.xml" in packed
    if end == signal.SIGTERM:
        what = "the call was ended from outside; 1 timed, 0 refused"
        assert steps["graphs"]["detail"] == what
        assert "logs/graphs.json" in packed
        assert sorted(path.name for path in tmp_path.glob("tmp.*")) == [], "nothing is left behind"


@pytest.fixture
def report(tmp_path, capsys):
    """Return a function that runs the report on steps: its status, its table and its JSON."""

    def run(*steps: tuple[str, int]) -> tuple[int, str, dict]:
        lines = (f"{name}\t{status}\t3\t60\n" for name, status in steps)
        (tmp_path / "about.json").write_text(json.dumps(ABOUT))
        (tmp_path / "steps.tsv").write_text("".join(lines))
        results = tmp_path / "results.json"
        status = suite_report.main([str(tmp_path), "--json", str(results)])
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
    assert results["about"] == ABOUT
    assert [step["passed"] for step in results["steps"]] == [True, True]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (("kernel-tests", 1), "6 passed, 1 failed"),
        (("kernel-tests", 124), "ended at its limit"),
        (("graphs-rest", 0), "no result"),
        (("kernel-tests", 125), "no time left"),
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
