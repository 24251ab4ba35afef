"""Writes adapters/models/covered.py and docs/models.md from the tests that there are.

python tests/support/write_models.py

What a test covers is read from the ids that pytest collects and, for tests that loop over classes,
from the data that they loop over.
"""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE, PAGE = ROOT / "adapters" / "models" / "covered.py", ROOT / "docs" / "models.md"
BY_ID = {
    "Cache": "test_cached_outputs_are_those_of_a_replay_in_plain_torch",
    "ControlNet": "test_controlnet_residuals_are_right_on_full_and_on_cached_steps",
}
"""Tests whose parameter is a class, by column."""

RANKS = "tests/parallel/checks_models_two.py::check_models_are_equal_in_every_mode"
"""The test that loops over the classes that can be spread over ranks."""

Covered = dict[str, tuple[str, list[str]]]
"""By column: the test, and the classes that it runs."""


def scan() -> Covered:
    """Return what the tests cover."""
    from model_case import find_class

    from dbcache.adapters.models.table import MODELS

    files = [
        path
        for path in sorted((ROOT / "tests").glob("*/test_*.py"))
        if any(f"def {test}(" in path.read_text() for test in BY_ID.values())
    ]
    collector = _Collector()
    options = ["--collect-only", "-q", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = pytest.main([*options, *map(str, files)], plugins=[collector])
    if code:
        raise RuntimeError(f"write_models: the tests must be collected, got\n{text.getvalue()}")
    here = [row.transformer for row in MODELS if find_class(row.transformer) is not None]
    return {column: _by_id(collector.ids, test, here) for column, test in BY_ID.items()} | _ranks()


class _Collector:
    """A plugin that keeps the ids of the tests."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.ids = [item.nodeid for item in session.items]


def _by_id(all_ids: list[str], test: str, classes: list[str]) -> tuple[str, list[str]]:
    ids = [one for one in all_ids if f"::{test}[" in one]
    parameters = {part for line in ids for part in line.partition("[")[2].rstrip("]").split("-")}
    found = sorted(name for name in classes if name in parameters)
    return (ids[0].partition("[")[0] if found else "", found)


def _ranks() -> Covered:
    """Return what the tests on several ranks cover; nothing where there are none."""
    attention, layers = [], []
    if importlib.util.find_spec("spread") is not None:
        import spread

        from dbcache.parallel.plans import PLANS

        rows = {name: PLANS[name] for name in sorted(spread.SUBJECTS)}
        attention = [name for name, row in rows.items() if row.attention]
        layers = [name for name, row in rows.items() if row.layers is None or row.layers]
    return {
        "Context parallel": (RANKS if attention else "", attention),
        "Tensor parallel": (RANKS if layers else "", layers),
    }


def module_text(covered: Covered) -> str:
    """Return the source of adapters/models/covered.py."""
    lines = [
        '"""Which test covers which transformer classes, by column of the matrix.',
        "",
        "Written by tests/support/write_models.py; a test compares it with the tests there are.",
        '"""',
        "",
        "COVERED: dict[str, tuple[str, tuple[str, ...]]] = {",
    ]
    for column, (test, classes) in covered.items():
        split = test.replace("::", '"\n        "::') if len(test) > 88 else test  # as ruff does
        lines += [f'    "{column}": (']
        lines += [f'        "{split}",']
        if len(classes) == 1:
            lines += [f'        ("{classes[0]}",),']
        elif classes:
            lines += ["        (", *(f'            "{name}",' for name in classes), "        ),"]
        else:
            lines += ["        (),"]
        lines += ["    ),"]
    return "\n".join([*lines, "}", ""])


def main() -> None:
    covered = scan()
    MODULE.write_text(module_text(covered))
    from dbcache.adapters.models import covered as written
    from dbcache.adapters.models.matrix import page

    written.COVERED.clear()
    written.COVERED.update(
        {column: (test, tuple(classes)) for column, (test, classes) in covered.items()}
    )
    PAGE.write_text(page())
    print(f"wrote {MODULE.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
