"""One table and one JSON file of what `bench/gpu_suite.sh` left in its folder of logs.

    python -m bench.suite_report LOGS --about cuda     first: write about.json, what runs where
    python -m bench.suite_report LOGS --json FILE      after each step

The first ends with status 2 where the suite cannot run, the second with 1 if a step failed, left no
result, ran no test or found no time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = {
    "graphs": "graphs.json",
    "kernels": "kernels.json",
    "overhead": "overhead.json",
    "loop": "loop.json",
}
"""What a measurement must leave besides its log. All other steps are tests."""
TIMEOUT = 124, 137
"""Exit statuses of a command that `timeout` ended."""
NO_TIME = 125
"""What the suite notes for a step that it did not begin."""
ENDED = 143
"""And for one during which the call was ended."""
PREPARATIONS = "wheels", "about"
NEEDED = "torch", "triton", "diffusers", "pytest", "hypothesis"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How a step of the suite went."""

    name: str
    status: int
    seconds: int
    limit: int
    detail: str
    """Counts of tests, or what is wrong."""
    passed: bool


def read_steps(logs: Path) -> list[Step]:
    """Return the steps that were run."""
    steps = []
    for line in (logs / "steps.tsv").read_text(encoding="utf-8").splitlines():
        name, status, seconds, limit = line.split("\t")
        detail, complete = _what_it_left(logs, name)
        if int(status) in TIMEOUT:
            detail = f"ended at its limit; {detail}"
        elif int(status) == NO_TIME:
            detail = "not begun: no time left"
        elif int(status) == ENDED:
            detail = f"the call was ended from outside; {detail}"
        steps.append(
            Step(
                name=name,
                status=int(status),
                seconds=int(seconds),
                limit=int(limit),
                detail=detail,
                passed=int(status) == 0 and complete,
            )
        )
    return steps


def _what_it_left(logs: Path, name: str) -> tuple[str, bool]:
    """Return a description of a step's results and whether they are there."""
    if name in PREPARATIONS:
        return "", True
    if name not in RESULTS:
        counts = test_counts(logs / f"{name}.xml")
        text = ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "no result"
        return text, counts["passed"] > 0
    found = (logs / RESULTS[name]).is_file()
    if not found:
        return f"no {RESULTS[name]}", False
    if name == "graphs":
        rows = read_json(logs / RESULTS[name])["rows"]
        refused = sum(bool(row["refused"]) for row in rows)
        return f"{len(rows) - refused} timed, {refused} refused", refused < len(rows)
    if name != "kernels":
        return "", True
    rows = read_json(logs / RESULTS[name])["rows"]
    counts = {
        "timed": sum(not row["refused"] for row in rows),
        "refused": sum(row["refused"] is not None and row["error"] is not None for row in rows),
        "left out": sum(row["refused"] is not None and row["error"] is None for row in rows),
    }
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n), counts["timed"] > 0


def test_counts(path: Path) -> dict[str, int]:
    """Return the counts of a JUnit file, zeros if pytest did not get to write it."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    if path.is_file():
        for suite in ET.parse(path).getroot().iter("testsuite"):
            number = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
            failed = number["failures"] + number["errors"]
            counts["failed"] += failed
            counts["skipped"] += number["skipped"]
            counts["passed"] += number["tests"] - failed - number["skipped"]
    return counts


def left_out(logs: Path) -> dict[str, str]:
    """Return the steps that were not run because something is missing, and what that is."""
    path = logs / "left_out.tsv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return dict(line.split("\t") for line in lines)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def about(device: str) -> dict[str, str]:
    """Return what runs where.

    Raises:
        SystemExit: with status 2; the suite cannot run here.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _refuse(f"{', '.join(missing)} not installed; hand wheels in as WHEELS=folder")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        _refuse("there is no GPU here (torch.cuda.is_available() is False); nothing was run")
    from bench.kernels import versions

    found = versions(torch.device(device))
    for package in ("diffusers", "transformers", "cache-dit", "numpy", "cuda-bindings"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _refuse(why: str) -> None:
    print(f"gpu_suite: {why}")
    raise SystemExit(2)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("logs", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--about", choices=("cpu", "cuda"), help="the device that the suite is for")
    what.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    logs: Path = arguments.logs
    if arguments.about:
        found = about(arguments.about)
        (logs / "about.json").write_text(json.dumps(found), encoding="utf-8")
        return 0
    return report(logs, arguments.json)


def report(logs: Path, file: Path) -> int:
    """Print the table, write the JSON file and return the status."""
    steps, found, missing = read_steps(logs), read_json(logs / "about.json"), left_out(logs)
    results = {name: read_json(logs / result) for name, result in RESULTS.items()}
    content = {
        "about": found,
        "steps": [asdict(step) for step in steps],
        "left_out": missing,
        **results,
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    for name in RESULTS:
        if (logs / f"{name}.log").is_file():
            log = (logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")
            # progress bars rewrite their line; only what they end with would be left of it
            lines = [line for line in log.splitlines() if "%|" not in line]
            print(f"-- {name}", *lines[-70:], "", sep="\n")
    if found["device"].startswith("CPU"):
        print("-- a rehearsal on the CPU: it tests the script, not the kernels")
    print(f"{'step':<15}{'result':<8}{'s':>5}{'limit':>7}  what")
    for step in steps:
        result = "passed" if step.passed else "FAILED"
        print(f"{step.name:<15}{result:<8}{step.seconds:5}{step.limit:7}  {step.detail}")
    for name, why in missing.items():
        print(f"{name:<15}{'-':<8}{'':12}  left out: {why}")
    print(" | ".join(f"{key} {value}" for key, value in found.items()))
    return int(not steps or not all(step.passed for step in steps))


if __name__ == "__main__":
    sys.exit(main())
