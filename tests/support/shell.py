"""The shell commands of a page, and whether a command line could run: program, options, files."""

import argparse
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from packaging.requirements import Requirement
from pages import ROOT

if sys.version_info >= (3, 11):
    import tomllib

SYSTEM = ("cd", "curl", "echo", "export", "grep", "mkdir")
"""Of every system: not looked at."""

PROGRAMS = (
    *SYSTEM, "bench/gpu_suite.sh", "dbcache", "dbcache-metrics", "git", "make", "pip",
    "pre-commit", "pytest", "python", "sglang", "torchrun", "vllm",
)  # fmt: skip
"""What the pages call by name."""

OTHERS = {"diffusers", "pre-commit", "pyyaml", "sglang", "vllm", "vllm-omni"}
"""Other projects that a page installs."""

ASSIGNED = re.compile(r"[A-Z_]+=.*")


def words_of(line: str) -> list[str]:
    """Return the words of a command, without assignments before it and comments after it."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe, in text
        return []
    while words and ASSIGNED.fullmatch(words[0]):
        del words[0]
    if words:
        words[0] = words[0].removeprefix(".venv/bin/")
    return words


def is_command(line: str) -> bool:
    """Whether a line calls one of `PROGRAMS`."""
    words = words_of(line)
    return words[:1] != [] and words[0] in PROGRAMS and words[1:2] != ["="]


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a page: lines of its blocks, and code between words.

    Raises:
        ValueError: a block has a command in one line, and in another line what is none.
    """
    fences = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    shell = ("sh", "bash", "console")
    blocks = [(block, True) for kind, block in fences.findall(text) if kind in shell]
    text = fences.sub("", text)
    blocks += [(block, False) for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]
    for block, is_shell in blocks:
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        lines = [line.removeprefix("$ ") for line in lines if words_of(line)]
        known = [line for line in lines if is_command(line)]
        if known != lines and (known or is_shell):
            raise ValueError(f"of these lines some are no known commands:\n{block}")
        parts = (part for line in known for part in re.split(" && | [|] ", line))
        yield from (part for part in parts if words_of(part)[0] not in SYSTEM)
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if " " in code and is_command(code):
            yield from code.split(" && ")


class Parsed(BaseException):
    """A program has taken its options; it is not to go on."""


def run_python(words: list[str]) -> None:
    """Start ``python -m MODULE ...`` or ``python FILE ...``, up to its options.

    Raises:
        ImportError, OSError: there is none. SystemExit: it does not take the options.
    """
    take = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        take(self, *args, **kwargs)
        raise Parsed

    is_module = words[0] == "-m"
    name, *rest = words[1:] if is_module else (str(ROOT / words[0]), *words[1:])
    if name == "bench.run" and not rest:  # takes no options, and would run everything
        assert importlib.util.find_spec(name)
        return
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(sys, "argv", [name, *rest]),
    ):
        try:
            (runpy.run_module if is_module else runpy.run_path)(name, run_name="__main__")
        except Parsed:
            return
    if rest:
        raise ValueError(f"{name} ended without having read {rest}")


def check_pytest(words: list[str]) -> None:
    """See that the files are there, the marks are known, and names that are asked for occur."""
    parser = argparse.ArgumentParser(prog="pytest")
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("-k", default="")
    parser.add_argument("-m", default="")
    given = parser.parse_args(words)
    sources = sorted((ROOT / "tests" / "support").glob("*.py"))  # parameters have names, too
    for path in given.paths:
        whole = ROOT / path
        assert whole.exists(), f"pytest: there is no {path}"
        sources += [whole] if whole.is_file() else sorted(whole.rglob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources).lower()
    asked = [set(re.findall(r"\w+", part)) - {"and", "or", "not"} for part in (given.k, given.m)]
    assert {name for name in asked[0] if name.lower() not in text} == set()
    marks = _project()["tool"]["pytest"]["ini_options"]["markers"]
    assert asked[1] <= {mark.partition(":")[0] for mark in marks}


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def check_pip(words: list[str]) -> None:
    """See that pip is asked for this project, by its name and extras, or for a known one."""
    parser = argparse.ArgumentParser(prog="pip")
    parser.add_argument("what", choices=["install", "uninstall"])
    parser.add_argument("names", nargs="+")
    for flag in ("--force-reinstall", "--no-deps"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args(words)
    own = _project()["project"]
    for name in given.names:
        wanted = Requirement(re.sub(r"^\.", own["name"], name))
        if given.what == "uninstall":  # the foreign package
            assert wanted.name == "dbcache"
        elif wanted.name == own["name"]:
            assert wanted.extras <= own["optional-dependencies"].keys(), name
        else:
            assert wanted.name in OTHERS, name


def check_make(words: list[str]) -> None:
    """See that make would do it, and that the tests that it is told to run are there."""
    done = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in words:
        if word.startswith("ARGS=") and "test" in words:
            check_pytest(shlex.split(word.removeprefix("ARGS=")))


def check_dbcache(words: list[str]) -> None:
    """See that `dbcache` takes the options; the name of a command alone is no command line."""
    from dbcache.cli import COMMANDS, parser
    from dbcache.metrics.cli import parser as of_metrics

    if len(words) == 1 and not words[0].startswith("-"):
        assert words[0] in COMMANDS
    elif words[0] == "metrics":
        of_metrics().parse_args(words[1:])
    else:
        parser().parse_args(words)


def check_torchrun(words: list[str]) -> None:
    """See that torchrun takes its options, and the script its own."""
    from torch.distributed.run import parse_args

    given = parse_args(words)
    script = given.training_script, *given.training_script_args
    if given.module and given.training_script == "dbcache":
        check_dbcache(list(script[1:]))
    elif script != ("script.py",):  # a reader's
        run_python(list(script))


def check(line: str) -> None:
    """See that a command line could run.

    Raises:
        AssertionError, ImportError, OSError, SystemExit, ValueError: it could not.
    """
    program, *words = words_of(line)
    if words[-1:] == ["..."] and len(words) < 3:
        words.pop()
    # what stands for the reader's words
    words = [word if word != "..." else "x" for word in words]
    if program == "torchrun" and words[0] == "x":
        words[0] = "--nproc-per-node=2"
    if program == "python" and words[:2] in (["-m", "pip"], ["-m", "pytest"]):
        program, words = words[1], words[2:]
    if program == "bench/gpu_suite.sh":
        assert words[1:] in (["first"], ["second"], ["wheels"])
        assert (ROOT / program).is_file()
        return
    if program == "dbcache-metrics":
        program, words = "dbcache", ["metrics", *words]
    checks = {
        "dbcache": check_dbcache, "make": check_make, "pip": check_pip, "pytest": check_pytest,
        "python": run_python, "torchrun": check_torchrun,
    }  # fmt: skip
    try:
        checks[program](words)
    except SystemExit as end:  # after --help
        if end.code != 0:
            raise
