"""The table of models as text for users: what is supported, and which test says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dbcache.adapters.models.table import MODELS, REFUSED

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

YES, NO = "✅", "–"


def covered(plans: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return the classes that a test runs, by column.

    Args:
        plans: `PLANS` of `dbcache.parallel.plans`, by class.
    """
    return {
        "Cache": {row.transformer for row in MODELS},
        "ControlNet": {row.transformer for row in MODELS if row.controlnet},
        "Context parallel": {name for name, plan in plans.items() if plan.attention},
        "Tensor parallel": {name for name, plan in plans.items() if plan.layers != {}},
    }


def matrix(plans: Mapping[str, Any]) -> str:
    """Return a Markdown table, a line per transformer class, with what a test covers ticked."""
    columns = covered(plans)
    header = ["Models", "Transformer", *columns]
    lines = [header, ["---", "---", *(":---:" for _ in columns)]]
    for row in sorted(MODELS, key=lambda row: row.models.lower()):
        ticks = [YES if row.transformer in classes else NO for classes in columns.values()]
        lines.append([row.models, f"`{row.transformer}`", *ticks])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(plans: Mapping[str, Any]) -> str:
    """Return the page of the documentation that shows the table."""
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
            matrix(plans),
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
