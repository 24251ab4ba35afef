"""The table of models as text for users: what is supported, and which test says so."""

from __future__ import annotations

from dbcache.adapters.models.covered import COVERED
from dbcache.adapters.models.table import MODELS, REFUSED

YES, NO = "✅", "–"


def matrix() -> str:
    """Return a Markdown table, a line per transformer class, with what a test covers ticked."""
    header = ["Models", "Transformer", *COVERED]
    lines = [header, ["---", "---", *(":---:" for _ in COVERED)]]
    for row in sorted(MODELS, key=lambda row: row.models.lower()):
        ticks = [YES if row.transformer in classes else NO for _, classes in COVERED.values()]
        lines.append([row.models, f"`{row.transformer}`", *ticks])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """Return the page of the documentation that shows the table."""
    tests = [f"- {column}: `{test}`" for column, (test, _) in COVERED.items() if test]
    refused = [f"- `{name}` {reason}." for name, reason in sorted(REFUSED.items())]
    return "\n".join(
        [
            "# Models",
            "",
            f"{len(MODELS)} transformer classes are known by name, with all pipelines that have "
            "one of them. `print(dbcache.supported_matrix())` shows this",
            "table. A tick stands for a test that runs a tiny model of the class; a dash says that "
            "none does, not that it fails. Any other model works",
            "through a [`BlockAdapter`](options.md#blockadapter-a-model-that-is-not-in-the-table). "
            "What is particular about video: [video.md](video.md).",
            "",
            matrix(),
            "",
            "The tests, each run with the class as its parameter or in its loop:",
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
