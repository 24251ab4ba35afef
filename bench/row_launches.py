"""What a batch whose samples decide for themselves costs the host: launches and time per step.

    python -m bench.run rows --launches

A FLUX transformer whose blocks do nothing, on Triton's path with launches that do nothing
(`bench/stubbed_triton.py`): a step on which all rows are full, and one on which all are cached.
"each" launches for all rows at once; "one by one" is the same with a launch per row, and "mean"
decides for the batch. The variants take turns; the time is the thread's own, the median of steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch

import dbcache
from bench import overhead
from bench.stubbed_triton import Launches, stubbed_triton
from dbcache.lanes import row_lanes

RULES = {"mean": "mean", "one by one": "each", "each": "each"}
"""How a batch is decided, and by which `batch_reduce`."""
WARMUP, STEPS = 4, 60


def _one_by_one() -> AbstractContextManager[object]:
    """Let each row go by itself, as under a tracer, which sees no addresses."""
    return mock.patch.object(row_lanes, "is_traced", return_value=True)


def _model(rule: str) -> tuple[Any, Callable[[], AbstractContextManager[object]]]:
    model = overhead.build(19, 38, "cpu")
    options: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": WARMUP}
    dbcache.enable(model, batch_reduce=RULES[rule], residual_diff_threshold=0.5, **options)
    return model, _one_by_one if rule == "one by one" else nullcontext


def batch(count: int) -> dict[str, Any]:
    """Return the arguments of a forward with `count` rows."""
    return {
        name: x.expand(count, *x.shape[1:]).clone() if isinstance(x, torch.Tensor)
        and not name.endswith("ids") else x
        for name, x in overhead.inputs("cpu").items()
    }  # fmt: skip


def measure(count: int, steps: int = STEPS) -> dict[tuple[str, str], tuple[int, float]]:
    """Return launches and milliseconds per step of `count` rows, by rule and kind of step."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    arguments = batch(count)
    with stubbed_triton() as launches, torch.no_grad():
        models = {rule: _model(rule) for rule in RULES}
        for step in range(WARMUP + steps):
            kind = "cached" if step % 2 else "full"
            launches.cached = kind == "cached" and step >= WARMUP
            for rule, (model, how) in models.items():
                with how():
                    one = _step(model, arguments, launches)
                if step >= WARMUP + 4:
                    found.setdefault((rule, kind), []).append(one)
    return {
        key: (statistics.mode(n for n, _ in rows), statistics.median(ms for _, ms in rows))
        for key, rows in found.items()
    }


def _step(model: Any, arguments: dict[str, Any], launches: Launches) -> tuple[int, float]:
    before, start = launches.counts.total(), time.thread_time()
    model(**arguments)
    return launches.counts.total() - before, 1e3 * (time.thread_time() - start)


def table(counts: tuple[int, ...] = (2, 4, 8)) -> str:
    """Return a line per number of rows and rule: launches and ms of full and cached steps."""
    lines = ["| rows | decides | launches, full / cached | ms, full / cached |"]
    lines.append("| --- | --- | --- | --- |")
    for count in counts:
        found = measure(count)
        for rule in RULES:
            full, cached = found[rule, "full"], found[rule, "cached"]
            ms = f"{full[1]:.2f} / {cached[1]:.2f}"
            lines.append(f"| {count} | {rule} | {full[0]} / {cached[0]} | {ms} |")
    return "\n".join(lines)
