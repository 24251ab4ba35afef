"""Shell commands of README, docs and docs/examples run, or at least exist and take their options.

Those of `dbcache` run, with a tiny model for any that a page names, and with less work where they
take minutes. Of the others, each program and file must be there and take its options: measurements
take minutes and have tests in tests/bench, `make` and `pip` set up environments.
"""

import ast
import contextlib
import io
import shlex
import sys
import warnings

import pytest
from diffusers import DiffusionPipeline
from pages import PAGES, ROOT
from reader import ReaderPipeline
from shell import check, commands, words_of

from dbcache.cli import main

if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

LEFT_OUT = {
    "git clone": "needs a network",
    "sglang": "a server, which needs a GPU",
    "vllm": "a server, which needs a GPU",
    "python main.py": "ComfyUI's",
    "pre-commit install": "changes the checkout",
    "python tests/support/matrix.py": "takes minutes",
    "python tests/support/write_models.py": "takes minutes, without options",
    "python -m dbcache": "is what all others here run",
}
"""Commands, by their beginning, that are not looked at."""

RUN = {
    "cli.md": {
        "dbcache --help": "generate",
        "dbcache info": "several ranks (gloo)",
        "dbcache masks --steps 28": "1111110100010000100000100001",
        "dbcache models [NAME]": "FluxTransformer2DModel",
        'dbcache generate ./flux --prompt "a cat" --steps 28 --cache balanced --compare '
        "--out cat.png": "PSNR",
    },
    "digits.md": {
        "dbcache tune moving-digits --steps 50 --speedup 2 --minutes 3 --out moving.json":
            "schedule='moving.json'",
    },
    "report.md": {
        "dbcache generate ... --summary run.json": "warm-up",
        "dbcache report run.json --out run.html": "Report: run.html",
    },
    "tuning.md": {
        "dbcache tune digits --steps 50 --speedup 2 --minutes 3 --out digits.json":
            "schedule='digits.json'",
        "dbcache compare digits --steps 50 --setting digits.json": "| 33% |",
        "dbcache sweep digits --steps 50 --setting preset=flux:fast --setting digits.json "
        "--plot digits.svg": "max_continuous_cached_steps=6",
    },
}  # fmt: skip
"""What is run, in this order, and of what each prints; tests/metrics runs those of metrics.md."""

LESS = {
    "--steps 50": "--steps 6 --pictures 2 --quiet",
    "--speedup 2 --minutes 3": "--full-steps 4 --minutes 0.02",
    "...": "./flux --prompt cat --quiet",
    "[NAME]": "flux",
}
"""What takes the place of words that stand for others, or that take minutes."""


def texts():
    """Return the pages, and of the examples what they say of themselves."""
    found = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    for file in sorted((ROOT / "docs" / "examples").glob("*.py")):
        source = file.read_text(encoding="utf-8")
        found[file.name] = ast.get_docstring(ast.parse(source)) + "\n"
    return found


FOUND = {name: list(commands(text)) for name, text in texts().items()}


def is_left_out(line):
    return any(shlex.join(words_of(line)).startswith(start) for start in LEFT_OUT)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", [name for name, lines in FOUND.items() if lines])
def test_the_commands_of_a_page_exist_and_take_their_options(name):
    wrong = []
    for line in FOUND[name]:
        if is_left_out(line):
            continue
        told = io.StringIO()
        try:
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                check(line)
        except (Exception, SystemExit) as error:
            wrong.append(f"{line}: {told.getvalue()[-300:]} {error!r}")
    assert wrong == []


@pytest.mark.usefixtures("one_thread", "plain_kernels")
@pytest.mark.parametrize("name", RUN)
def test_the_commands_of_dbcache_run(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", ReaderPipeline.from_pretrained)
    assert set(RUN[name]) <= set(FOUND[name])
    for line, said in RUN[name].items():
        for words, others in LESS.items():
            line = line.replace(words, others)
        told = io.StringIO()
        with (
            contextlib.redirect_stdout(told),
            contextlib.redirect_stderr(told),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            try:
                code = main(words_of(line)[1:])
            except SystemExit as end:
                code = end.code
        assert code == 0, told.getvalue()
        assert said in told.getvalue()
        written = [word for word in words_of(line) if word.endswith((".png", ".html", ".svg"))]
        assert all((tmp_path / file).stat().st_size > 50 for file in written)


def test_what_is_left_out_is_there():
    lines = [line for lines in FOUND.values() for line in lines]
    assert len(lines) > 80
    assert all(lines for name, lines in FOUND.items() if name.endswith(".py"))
    for start in LEFT_OUT:
        assert any(shlex.join(words_of(line)).startswith(start) for line in lines), start


@pytest.mark.parametrize(
    "line",
    [
        "dbcache generat ./flux",
        "dbcache masks --step 3",
        "dbcache-metrics psnrs -i1 a.png -i2 b.png",
        "make nothing",
        'make test ARGS="tests/nothing"',
        "pip install dbcache",
        "pip install 'dbcache-dit[nothing]'",
        "python -m bench.nothing",
        "python -m bench.memory --nothing",
        "python -m bench.run nothing",
        "python -m pytest tests/core -k nothing_is_called_so",
        "pytest tests/core -m nothing",
        "python docs/examples/nothing.py",
        "torchrun --nproc-per-node 2 docs/examples/parallel.py nothing",
        "bench/gpu_suite.sh OUTDIR third",
    ],
)
def test_a_command_that_does_not_exist_is_seen(line, capsys):
    assert list(commands(f"Then:\n\n    $ {line}\n")) == [line]
    assert list(commands(f"```sh\n{line}\n```\n")) == [line]
    assert list(commands(f"Call `{line}` then.")) == [line]
    with pytest.raises((AssertionError, ImportError, OSError, SystemExit, ValueError)):
        check(line)


def test_a_block_with_an_unknown_program_is_seen():
    for text in ("    make test\n    mak lint\n", "```bash\nmak lint\n```\n"):
        with pytest.raises(ValueError, match="no known commands"):
            list(commands(text))
    assert list(commands("    image = pipe(prompt)\n")) == []
