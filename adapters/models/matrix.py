"""The table of models as text for users: what is supported, as the tests say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dbcache.adapters.models.table import MODELS

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
    for row in MODELS:
        ticks = [YES if row.transformer in classes else NO for classes in columns.values()]
        lines.append([row.models, f"`{row.transformer}`", *ticks])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
