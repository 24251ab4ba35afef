"""The cache beside compile, offload, LoRA and quantised weights: cells of a matrix, and its table.

    python tests/support/matrix.py FILE         runs all cells; prints the table
    python tests/support/matrix.py FILE --write puts the table into docs/together.md, too

FILE keeps what each cell gave, a line of JSON each: cells that are in it are not run again, so that
a run may be cut short and gone on with, or split (``--part 1/4``: each fourth part from the first).

A cell builds a tiny model in the order that the document gives, denoises twice, and compares the
second request with the reference: the model of these weights in eager mode and without offload,
there with the same cache, or without dbcache where the threshold is 0.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DBCACHE_KERNELS", "reference")
    sys.path.insert(0, str(Path(__file__).parent))

import accelerate
import tiny
import torch

import dbcache

CPU = torch.device("cpu")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "together.md"
STEPS = 7
FACTORS = {
    "compile": ("eager", "regional", "whole"),
    "offload": ("none", "sequential", "group block", "group leaf"),
    "weights": ("plain", "LoRA", "int8"),
    "cache": ("threshold 0", "F1B0", "F1B0 FoCa", "EasyCache"),
    "model": ("flux", "wan"),
}
ON = {"max_warmup_steps": 3, "residual_diff_threshold": 1.0, "max_continuous_cached_steps": 2}
CACHES: dict[str, dict[str, Any]] = {
    "threshold 0": ON | {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.0},
    "F1B0": ON | {"Fn_compute_blocks": 1},
    "F1B0 FoCa": ON | {"Fn_compute_blocks": 1, "enable_foca": True, "enable_encoder_foca": True},
    "EasyCache": ON | {"policy": "easycache", "residual_diff_threshold": 5.0},
}
BUILDS: dict[str, Callable[[], torch.nn.Module]] = {
    "flux": lambda: tiny.flux(double=2, single=3),
    "wan": lambda: tiny.wan(layers=4),
}


class Backend:
    """A backend of torch.compile that runs the graph as it is, and counts."""

    def __init__(self) -> None:
        self.runs = self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


BACKEND = Backend()  # one for all, so that Dynamo compiles each class of blocks once per kind


def with_lora(model: torch.nn.Module) -> None:
    """Add an adapter that does something."""
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"])
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)


def with_int8(model: torch.nn.Module) -> None:
    """Quantise the weights of the blocks' linear layers."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    inside = ("blocks.", "transformer_blocks.")

    def is_inside(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and any(part in name for part in inside)

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_inside)


WEIGHTS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "plain": lambda model: None,
    "LoRA": with_lora,
    "int8": with_int8,
}
OFFLOADS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "none": lambda model: None,
    "sequential": lambda model: accelerate.cpu_offload(model, CPU, offload_buffers=False),
    "group block": lambda model: model.enable_group_offload(
        CPU, CPU, offload_type="block_level", num_blocks_per_group=1
    ),
    "group leaf": lambda model: model.enable_group_offload(CPU, CPU, offload_type="leaf_level"),
}


COMPILES: dict[str, Callable[[torch.nn.Module], Any]] = {
    "eager": lambda model: None,
    "regional": lambda model: dbcache.compile(model, backend=BACKEND),
    "whole": lambda model: model.compile(backend=BACKEND),
}


@dataclass
class Result:
    """What a cell did.

    Attributes:
        outputs: of every step of two requests.
        cached: cached steps of the second one.
        compiled: graphs that ran in the second one.

    """

    outputs: list[torch.Tensor] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    compiled: int = 0
    limit: str | None = None


def run(cell: dict[str, str], *, with_dbcache: bool = True) -> Result:
    """Build a model in the order of the document, and denoise twice."""
    family, model = tiny.FAMILIES[cell["model"]], BUILDS[cell["model"]]()
    WEIGHTS[cell["weights"]](model)
    model.requires_grad_(False)
    OFFLOADS[cell["offload"]](model)
    COMPILES[cell["compile"]](model)
    if with_dbcache:
        dbcache.enable(model, num_inference_steps=STEPS, **CACHES[cell["cache"]])
    result = Result()
    for _ in range(2):
        before = BACKEND.runs
        result.outputs += tiny.denoise(model, family, STEPS, named=True)
        result.compiled = BACKEND.runs - before
    if with_dbcache:
        result.cached = dbcache.summary(model, logging=False)[0].cached_steps
    return result


@functools.cache
def reference(model: str, weights: str, cache: str) -> Result:
    """Return what a cell must give."""
    cell = {"model": model, "weights": weights, "cache": cache}
    cell |= {"compile": "eager", "offload": "none"}
    return run(cell, with_dbcache=cache != "threshold 0")


@functools.cache
def limit(model: str, weights: str, offload: str, compile: str) -> str | None:
    """Return why the libraries cannot do this by themselves; None where they can."""
    cell = {"model": model, "weights": weights, "offload": offload, "compile": compile}
    torch._dynamo.reset()  # what it has compiled for other models may hide it
    try:
        run(cell, with_dbcache=False)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None


def moves_quantised_weights(cell: dict[str, str]) -> bool:
    """Whether the weights of compiled blocks are quantised and moved, which torch may refuse."""
    is_moved = "group" in cell["offload"] and cell["compile"] != "eager"
    return is_moved and cell["weights"] == "int8"


def check(cell: dict[str, str]) -> str:
    """Run a cell and compare; return "same", or what the libraries cannot do.

    Raises:
        AssertionError: it gave something else. Whatever the cell raises.
    """
    want = reference(cell["model"], cell["weights"], cell["cache"])
    if moves_quantised_weights(cell):
        torch._dynamo.reset()  # where nothing is compiled anew, the limit does not show
    try:
        got = run(cell)
    except Exception:
        reason = limit(cell["model"], cell["weights"], cell["offload"], cell["compile"])
        if reason is None:
            raise
        return reason
    assert len(got.outputs) == len(want.outputs)
    for step, pair in enumerate(zip(got.outputs, want.outputs, strict=True)):
        assert torch.equal(*pair), f"{cell}: step {step} differs"
    assert got.cached == want.cached, cell
    assert bool(got.cached) == (cell["cache"] != "threshold 0"), cell
    assert (got.compiled > 0) == (cell["compile"] != "eager"), cell
    return "same"


def cells() -> list[dict[str, str]]:
    """Return all cells."""
    products = itertools.product(*FACTORS.values())
    return [dict(zip(FACTORS, values, strict=True)) for values in products]


def parts() -> list[list[dict[str, str]]]:
    """Return all cells, those with the same compile, offload and weights together."""
    names = ("compile", "offload", "weights")
    groups = itertools.groupby(cells(), lambda cell: [cell[name] for name in names])
    return [list(group) for _, group in groups]


def _pairs(cell: dict[str, str]) -> set[tuple[tuple[str, str], ...]]:
    return set(itertools.combinations(cell.items(), 2))


def pairwise() -> Iterator[dict[str, str]]:
    """Yield cells such that each pair of values is in one of them, by greedy choice.

    Pairs with a model do not count: most cells that compile have the one with one class of blocks.
    """
    kinds = [{k: v for k, v in cell.items() if k != "model"} for cell in cells()]
    missing = set().union(*map(_pairs, kinds))
    compiled = 0
    while missing:
        best = max(kinds, key=lambda cell: len(_pairs(cell) & missing))
        missing -= _pairs(best)
        compiled += best["compile"] != "eager"
        is_flux = best["compile"] == "eager" or compiled % 4 == 1
        yield best | {"model": "flux" if is_flux else "wan"}


LIMITS = {"Couldn't swap": "torch's limit"}
"""What the libraries say where they cannot do it by themselves, and what the table calls that."""


def table(results: Sequence[tuple[dict[str, str], str]]) -> str:
    """Return Markdown: a row per offload and weights, a column per way to compile."""
    compiles = FACTORS["compile"]
    lines = [
        f"| offload | weights | {' | '.join(compiles)} |",
        "| --- " * (2 + len(compiles)) + "|",
    ]
    for offload, weights in itertools.product(FACTORS["offload"], FACTORS["weights"]):
        row = []
        for how in compiles:
            key = {"offload": offload, "weights": weights, "compile": how}
            counts = Counter(named(text) for cell, text in results if key.items() <= cell.items())
            row.append(", ".join(f"{text} ({n})" for text, n in sorted(counts.items())) or "-")
        lines.append(f"| {offload} | {weights} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def named(text: str) -> str:
    """Return what the table says of the result of a cell."""
    return next((name for part, name in LIMITS.items() if part in text), text)


def kept(path: Path) -> list[tuple[dict[str, str], str]]:
    """Return the results that a file has, in the order of the cells."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    found = [(entry["cell"], entry["result"]) for entry in map(json.loads, lines)]
    order = cells()
    return sorted(found, key=lambda pair: order.index(pair[0]))


def write_table(text: str) -> None:
    """Put the table into the document, in place of the one there."""
    before, _, rest = DOCUMENT.read_text("utf-8").partition("| offload | weights |")
    after = rest[rest.index("\n\n") :]
    DOCUMENT.write_text(before + text + after, "utf-8")


def main() -> None:
    """Run what has not been run; print the table."""
    import warnings

    parser = argparse.ArgumentParser(description="Runs the matrix of docs/together.md.")
    parser.add_argument("file", type=Path, help="keeps the results, a line of JSON each")
    parser.add_argument("--part", default="1/1", help="which cells to run, as in 2/4")
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    options = parser.parse_args()
    index, of = map(int, options.part.split("/"))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = [cell for cell, _ in kept(options.file)]
    for part in parts()[index - 1 :: of]:
        torch._dynamo.reset()
        for cell in (cell for cell in part if cell not in known):
            try:
                text = check(cell)
            except Exception as error:
                text = f"**{type(error).__name__}**"
                print(cell, repr(error)[:1000], file=sys.stderr, flush=True)
            with options.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"cell": cell, "result": text}) + "\n")
    text = table(kept(options.file))
    print(text)
    if options.write:
        write_table(text)


if __name__ == "__main__":
    main()
