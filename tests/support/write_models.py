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


def scan() -> dict[str, set[str]]:
    """Return the classes that the tests run, by column of the matrix."""
    import spread
    from model_case import find_class

    from dbcache.adapters.models.matrix import TESTS
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


def main() -> None:
    from dbcache.adapters.models.matrix import page
    from dbcache.parallel.plans import PLANS

    PAGE.write_text(page(PLANS))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
