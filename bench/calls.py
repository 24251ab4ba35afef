"""Python calls that a cached step and a full step make into the package, file by file.

    python -m bench.calls [--functions] [--json FILE]

The trained digits model (a FLUX transformer, F1B0, one image) on the CPU, where the kernels'
PyTorch references run. The cache is enabled on the transformer, which is called by itself, or on
its pipeline, whose step has the scheduler's part as well. Each call of a function of the package
counts: properties, comprehensions (before Python 3.12), each item of a generator, and the methods
that dataclasses are given, too. "changes" is how often a call is to another file than the one
before. Numbers are those of the step with the most calls of its kind in a second request.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType
from typing import Any

import torch

import dbcache
from dbcache.demo import digits

PACKAGE = "dbcache"
TARGETS = "transformer", "pipeline"
WARMUP_STEPS = 4
PARTS = "kernels", "adapters", "parallel"
"""Folders beside that of the package, which is installed with them inside."""
KERNELS = "kernels/"


@dataclass(frozen=True, slots=True)
class Step:
    """The calls of one step: module and function of each, in order."""

    calls: tuple[tuple[str, str], ...]

    def by_file(self, *, kernels: bool = True) -> Counter[str]:
        """Return the number of calls by file, with those of the kernels or without."""
        files = (_file_of(module) for module, _ in self.calls)
        return Counter(file for file in files if kernels or not file.startswith(KERNELS))

    def functions(self, *, kernels: bool = True) -> int:
        """Return how many different functions are called."""
        return len({c for c in self.calls if kernels or not _file_of(c[0]).startswith(KERNELS)})

    def changes(self, *, kernels: bool = True) -> int:
        """Return how often a call is to another file than the call before."""
        files = [_file_of(module) for module, _ in self.calls]
        files = [file for file in files if kernels or not file.startswith(KERNELS)]
        return sum(a != b for a, b in pairwise(files))


def _file_of(module: str) -> str:
    """Return where the repository has a module, as in ``kernels/decision/decide.py``."""
    package, *names = module.split(".")
    if not names or names[0] not in PARTS:
        names.insert(0, package)
    if hasattr(sys.modules[module], "__path__"):
        names.append("__init__")
    return "/".join(names) + ".py"


class Recorder:
    """Records calls into the package while it is on, cut into steps by `end_step`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._calls: list[tuple[str, str]] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        """Record in this thread."""
        before = sys.getprofile()
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(before)

    def end_step(self) -> None:
        """Cut: what comes next belongs to the next step."""
        self.steps.append(Step(tuple(self._calls)))
        self._calls = []

    def _note(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event != "call":
            return
        module = frame.f_globals.get("__name__", "")
        if module == PACKAGE or module.startswith(PACKAGE + "."):
            code = frame.f_code
            self._calls.append((module, getattr(code, "co_qualname", code.co_name)))


def record(target: str, *, steps: int = 28, threshold: float = 0.3) -> dict[str, Step]:
    """Draw a digit twice and return a "cached" and a "full" step of the second time.

    Args:
        target: on what the cache is enabled, and what is called: ``"transformer"``, with the
            inputs that the plain pipeline gives it, or ``"pipeline"``.
        steps: denoising steps.
        threshold: `residual_diff_threshold`, such that steps of both kinds come after the warm-up.

    Raises:
        RuntimeError: no step of one kind is left to count.
    """
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder()

    def draw_with_pipeline() -> None:
        generator = torch.Generator().manual_seed(0)
        pipe(
            **digits.prompt([3]),
            num_inference_steps=steps,
            generator=generator,
            callback_on_step_end=at_end,
        )

    def at_end(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        recorder.end_step()
        return tensors

    inputs: list[dict[str, Any]] = []

    @torch.no_grad()
    def draw_with_transformer() -> None:
        for given in inputs:
            pipe.transformer(**given)
            recorder.end_step()

    if target == "transformer":
        hook = pipe.transformer.register_forward_pre_hook(
            lambda _module, _args, given: inputs.append(given), with_kwargs=True
        )
        draw_with_pipeline()
        hook.remove()
    enabled, draw = {
        "transformer": (pipe.transformer, draw_with_transformer),
        "pipeline": (pipe, draw_with_pipeline),
    }[target]
    dbcache.enable(
        enabled,
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=WARMUP_STEPS,
        residual_diff_threshold=threshold,
        num_inference_steps=steps,
    )
    draw()
    recorder.steps.clear()
    with recorder.on():
        draw()
    cached = dbcache.summary(enabled, logging=False).lanes[0].cached_steps
    return most_calls(recorder.steps, cached)


def most_calls(steps: list[Step], cached_steps: list[int]) -> dict[str, Step]:
    """Return the cached step and the full one with the most calls, after the warm-up.

    Raises:
        RuntimeError: there is none.
    """
    kinds: dict[str, list[Step]] = {"cached": [], "full": []}
    for index in range(WARMUP_STEPS, len(steps)):
        kinds["cached" if index in cached_steps else "full"].append(steps[index])
    for kind, found in kinds.items():
        if not found:
            raise RuntimeError(
                f"bench.calls: there must be a {kind} step after the warm-up, got cached steps "
                f"{cached_steps} of {len(steps)}; choose another threshold"
            )
    return {kind: max(found, key=lambda step: len(step.calls)) for kind, found in kinds.items()}


def table(found: dict[str, dict[str, Step]]) -> str:
    """Return files by calls: a column per target and kind of step."""
    columns = [
        (f"{kind}, {target}", step) for target in found for kind, step in found[target].items()
    ]
    counts = [step.by_file() for _, step in columns]
    files = sorted(set().union(*counts), key=lambda file: (file.startswith(KERNELS), file))
    width = max(map(len, files)) + 2
    lines = [" " * width + "".join(f"{name:>20}" for name, _ in columns)]
    lines += [f"{f:<{width}}" + "".join(f"{c[f] or '-':>20}" for c in counts) for f in files]
    for kernels, name in ((False, "outside kernels/"), (True, "all")):
        sums = []
        for _, step in columns:
            by_file = step.by_file(kernels=kernels)
            sums.append(f"{by_file.total()} in {len(by_file)}")
        lines.append(f"{name + ': calls in files':<{width}}" + "".join(f"{s:>20}" for s in sums))
        for what in ("functions", "changes"):
            numbers = [getattr(step, what)(kernels=kernels) for _, step in columns]
            lines.append(f"{name + ': ' + what:<{width}}" + "".join(f"{n:>20}" for n in numbers))
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--functions", action="store_true", help="also list the calls, in order")
    parser.add_argument("--json", metavar="FILE", help="also write the counts here")
    arguments = parser.parse_args()
    found = {target: record(target) for target in TARGETS}
    print(f"# Python calls per step | dbcache {dbcache.__version__} | digits model, F1B0, CPU")
    print(table(found))
    if arguments.functions:
        for target, kinds in found.items():
            for kind, step in kinds.items():
                print(f"-- {kind}, {target}")
                print(*(f"{_file_of(module)}: {name}" for module, name in step.calls), sep="\n")
    if arguments.json:
        counts = {t: {k: s.by_file() for k, s in kinds.items()} for t, kinds in found.items()}
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"version": dbcache.__version__, "calls": counts}, file, indent=1)


if __name__ == "__main__":
    main()
