"""Writes docs/models.md from the table of models; `scan` tells what the tests cover.

python tests/support/write_models.py

What a test covers is read from the ids that pytest collects and, for tests that loop over classes,
from the data that they loop over.
"""

import contextlib
import io
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"

_RANKS = "tests/parallel/checks_models_two.py::check_models_are_equal_in_every_mode"
TESTS = {
    "Cache": (
        "tests/adapters/test_models.py::test_cached_outputs_are_those_of_a_replay_in_plain_torch"
    ),
    "ControlNet": (
        "tests/adapters/test_added_residuals.py"
        "::test_controlnet_residuals_are_right_on_full_and_on_cached_steps"
    ),
    "Context parallel": _RANKS,
    "Tensor parallel": _RANKS,
}
"""The columns, each with the test that runs the classes which are ticked."""


def scan() -> dict[str, set[str]]:
    """Return the classes that the tests run, by column of the matrix."""
    import spread
    from model_case import find_class

    from dbcache.adapters.models.table import MODELS
    from dbcache.parallel.plans import PLANS

    collector = _Collector()
    options = ["--collect-only", "-q", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    tests = [f"{ROOT}/{TESTS[column]}" for column in ("Cache", "ControlNet")]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = pytest.main([*options, *tests], plugins=[collector])
    if code:
        raise RuntimeError(f"write_models: the tests must be collected, got\n{text.getvalue()}")
    here = {row.transformer for row in MODELS if find_class(row.transformer) is not None}
    plans = {name: PLANS[name] for name in spread.SUBJECTS}
    return {
        "Cache": here & collector.parameters(TESTS["Cache"]),
        "ControlNet": here & collector.parameters(TESTS["ControlNet"]),
        "Context parallel": {name for name, plan in plans.items() if plan.attention},
        "Tensor parallel": {name for name, plan in plans.items() if plan.layers != {}},
    }


class _Collector:
    """A plugin that keeps the ids of the tests."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.ids = [item.nodeid for item in session.items]

    def parameters(self, test: str) -> set[str]:
        """Return the parts of the parameters that a test runs with."""
        ids = [one.partition("[")[2] for one in self.ids if one.startswith(f"{test}[")]
        return {part for line in ids for part in line.rstrip("]").split("-")}


def page() -> str:
    """Return the page of the documentation that shows the table."""
    from dbcache.adapters.models.matrix import matrix
    from dbcache.adapters.models.table import MODELS, REFUSED
    from dbcache.parallel.plans import PLANS

    tests = [f"- {column}: `{test}`" for column, test in TESTS.items()]
    alike: dict[str, list[str]] = {}
    for name, reason in sorted(REFUSED.items()):
        alike.setdefault(reason, []).append(f"`{name}`")
    refused = [
        f"- {', '.join(names)}{': each one' if len(names) > 1 else ''} {reason}."
        for reason, names in alike.items()
    ]
    return "\n".join(
        [
            "# Models",
            "",
            f"{len(MODELS)} transformer classes are known by name, with all pipelines that use "
            "them. `print(dbcache.supported_matrix())` shows this table.",
            "",
            "A tick stands for a test that runs a tiny model of the class with random weights, on "
            "a CPU. A dash says that no test does, not that it fails.",
            "**No real checkpoint has been run yet.** Any other model works through a "
            "[`BlockAdapter`](options.md#blockadapter-a-model-that-is-not-in-the-table).",
            "What differs for video models: [video](video.md).",
            "",
            matrix(PLANS),
            "",
            "The tests, each run with every ticked class:",
            "",
            *tests,
            "",
            "These classes are refused, with the reason:",
            "",
            *refused,
            "",
            "This page is written by `python tests/support/write_models.py`.",
            "",
        ]
    )


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
