"""Latency of full and cached steps: plain, eager cache, graphs, and cache-dit, in one run.

    python -m bench.graphs [--device cuda] [--rounds N] [--seconds S] [--models flux-512 ...]
                           [--json FILE]

Random weights, and two inputs in turn that differ a little: every step is measured and decided, and
comes out as "full" or "cached" by a threshold far below or far above that difference. Variants take
turns; a time is that from the call to the end of the device's work, once with the device idle
before each step ("latency") and once for steps in a row ("throughput"). Decisions that the host
waits for cost latency in both; graphs save the host's launches. A variant that caches other steps
than it must is refused: its times tell nothing. That, or a variant of dbcache that does not run
where the driver allows it, ends the benchmark with status 1, after the table. The JSON file is
written anew after each model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import dbcache
from bench.loop import build, inputs_of
from bench.overhead import header
from dbcache.graphs.cuda_driver import find_driver

ROW = 8
"""Steps in a row whose time is taken together; half of them where steps are slow."""
TURNS = 2
"""How often the variants take turns."""
FEWEST = 3
"""Steps whose latency is taken in a turn, however slow they are."""


@dataclass(frozen=True)
class Model:
    """A FLUX transformer by its size; `pixels` says how many tokens it gets."""

    double: int
    single: int
    heads: int
    pixels: int


MODELS = {
    "small-256": Model(4, 8, 8, 256),
    "flux-512": Model(19, 38, 24, 512),
    "flux-1024": Model(19, 38, 24, 1024),
}
TINY = Model(2, 2, 2, 64)
"""For a rehearsal on the CPU."""


def options(kind: str) -> dict[str, Any]:
    """Return what makes each step after the first one `kind`."""
    return {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": 1,
        # from 1 on and at 0 cache-dit would not measure
        "residual_diff_threshold": 0.9 if kind == "cached" else 1e-6,
    }


@dataclass
class Variant:
    """One way to run the model."""

    kind: str
    engine: str
    switch_on: Callable[[torch.nn.Module], object]
    switch_off: Callable[[torch.nn.Module], object]
    cached_steps: Callable[[torch.nn.Module], int] = lambda _: 0
    latency: list[float] = field(default_factory=list)
    throughput: list[float] = field(default_factory=list)
    refused: str = ""
    is_wrong: bool = False


def dbcache_variant(kind: str, mode: str | None) -> Variant:
    """Return dbcache, eager or with graphs of a mode."""

    def switch_on(model: torch.nn.Module) -> object:
        return dbcache.enable(model, **options(kind), cuda_graph=mode or False)

    def cached_steps(model: torch.nn.Module) -> int:
        return len(dbcache.summary(model, logging=False).lanes[0].cached_steps)

    return Variant(kind, f"dbcache {mode or 'eager'}", switch_on, dbcache.disable, cached_steps)


def cache_dit_variant(kind: str) -> Variant:
    """Return cache-dit, which has no graphs."""

    def switch_on(model: torch.nn.Module) -> object:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        import cache_dit

        config = cache_dit.DBCacheConfig(**options(kind), enable_separate_cfg=False)
        return cache_dit.enable_cache(model, cache_config=config)

    def switch_off(model: torch.nn.Module) -> object:
        import cache_dit

        return cache_dit.disable_cache(model)

    def cached_steps(model: torch.nn.Module) -> int:
        import cache_dit

        return len(cache_dit.summary(model, logging=False)[0].cached_steps)

    return Variant(kind, "cache-dit", switch_on, switch_off, cached_steps)


def measure(
    variant: Variant, model: torch.nn.Module, inputs: list[dict], rounds: int, seconds: float
) -> None:
    """Fill the variant's times, in ms, or say why there are none; what was refused stays so."""
    if variant.refused:
        return
    try:
        variant.switch_on(model)
        try:
            steps = time_steps(variant, model, inputs, rounds, seconds)
            cached = variant.cached_steps(model)
        finally:
            variant.switch_off(model)
    except (RuntimeError, ImportError) as error:
        variant.refused = str(error)
        return
    expected = steps - 1 if variant.kind == "cached" else 0
    if cached != expected:
        variant.is_wrong = True
        variant.refused = f"must cache {expected} of {steps} steps, got {cached}"


def time_steps(
    variant: Variant, model: torch.nn.Module, inputs: list[dict], rounds: int, seconds: float
) -> int:
    """Fill the times and return the number of steps; the first ones warm up and record.

    Args:
        variant: is switched on.
        model: the transformer.
        inputs: two inputs, that take turns.
        rounds: steps whose latency is taken, at most.
        seconds: time for them, and as much again for rows.
    """
    device = next(model.parameters()).device
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    count = 0

    def timed(row: int) -> float:
        nonlocal count
        wait()
        start = time.perf_counter()
        for _ in range(row):
            model(**inputs[count % 2])
            count += 1
        wait()
        return (time.perf_counter() - start) * 1e3 / row

    def several(row: int, most: int, fewest: int) -> list[float]:
        times: list[float] = []
        while len(times) < most and (len(times) < fewest or sum(times) * row < seconds * 1e3):
            times.append(timed(row))
        return times

    timed(3)
    latency = several(1, rounds, FEWEST)
    row = ROW if statistics.median(latency) * ROW < seconds * 1e3 else ROW // 2
    variant.latency += latency
    variant.throughput += several(row, max(1, rounds // ROW), 1)
    return count


@dataclass(frozen=True)
class Line:
    """One line of the table; times in ms."""

    model: str
    step: str
    engine: str
    latency_p50: float | None
    throughput_p50: float | None
    refused: str
    """Why there are no times."""
    is_wrong: bool = False
    """Whether it cached other steps than it must."""


def run(
    name: str, spec: Model, device: str, rounds: int, seconds: float, engines: list[str]
) -> list[Line]:
    """Measure all variants on one model."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build(device, spec.double, spec.single, spec.heads, dtype)
    arguments = inputs_of(spec.pixels, device, dtype)
    side = spec.pixels // 16
    arguments["hidden_states"] = torch.randn(1, side * side, 64, device=device, dtype=dtype)
    arguments["timestep"] = torch.full((1,), 0.5, device=device, dtype=dtype)
    other = torch.randn_like(arguments["hidden_states"])
    inputs = [arguments, arguments | {"hidden_states": arguments["hidden_states"] + 0.1 * other}]
    plain = Variant("full", "plain", lambda _: None, lambda _: None)
    variants = [plain]
    for kind in ("full", "cached"):
        variants += [dbcache_variant(kind, mode) for mode in (None, "host", "device")]
        if "cache-dit" in engines:
            variants.append(cache_dit_variant(kind))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # each variant's steps lie together, as recording takes a while; the rounds alternate
        for _ in range(TURNS):
            for variant in variants:
                measure(variant, model, inputs, max(ROW, rounds // TURNS), seconds)
    return [
        Line(
            name,
            v.kind,
            v.engine,
            None if v.refused else statistics.median(v.latency),
            None if v.refused else statistics.median(v.throughput),
            v.refused,
            v.is_wrong,
        )
        for v in variants
    ]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=48, help="most steps per variant")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="per variant and turn, for each kind of time"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--engines", nargs="+", default=["dbcache", "cache-dit"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the lines here")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.graphs: there is no GPU here; --device cpu rehearses")
    chosen = {name: MODELS[name] for name in arguments.models}
    if arguments.device == "cpu":
        print("bench.graphs: a rehearsal on the CPU with a tiny model, without graphs")
        chosen = {"tiny": TINY}
    print(header(arguments.device))
    print(f"{'model':<12}{'step':<8}{'engine':<16}{'latency ms':>11}{'in a row ms':>13}")
    rows: list[Line] = []
    for name, spec in chosen.items():
        for row in run(
            name, spec, arguments.device, arguments.rounds, arguments.seconds, arguments.engines
        ):
            rows.append(row)
            figures = f"  {row.refused[:60]}"
            if row.latency_p50 is not None:
                figures = f"{row.latency_p50:11.3f}{row.throughput_p50:13.3f}"
            print(f"{row.model:<12}{row.step:<8}{row.engine:<16}{figures}", flush=True)
        if arguments.json:
            result = {"header": header(arguments.device), "rows": [asdict(row) for row in rows]}
            arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    failures = failed(rows, arguments.device)
    if failures:
        raise SystemExit("bench.graphs: these must run here:\n" + "\n".join(failures))


def failed(rows: list[Line], device: str) -> list[str]:
    """Return what cached wrong steps, and what of dbcache did not run though the driver allows it.

    On a CPU nothing is recorded.
    """
    driver, _ = find_driver()
    ours = ["dbcache eager", "dbcache host", "dbcache device"]
    must_run = ours[:1] if device == "cpu" else ours if driver is not None else ours[:2]
    return [
        f"{row.model}, {row.step}, {row.engine}: {row.refused}"
        for row in rows
        if row.is_wrong or (row.refused and row.engine in must_run)
    ]


if __name__ == "__main__":
    main()
