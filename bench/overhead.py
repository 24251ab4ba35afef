"""Host time that a cache adds to one step of a FLUX transformer whose blocks do nothing.

    python -m bench.overhead [--device cpu|cuda] [--triton] [--requests N] [--json FILE]

A real FluxTransformer2DModel of 19 + 38 blocks, narrow and with few tokens, whose blocks return
their inputs (the first adds a constant, so that there is a probe residual). What remains is what
the cache does per step. Three kinds of step:

    full step (warm-up)         no decision                      minus the plain model
    full step (threshold miss)  decided: changed too much        minus the plain model
    cached step                 decided: similar, 56 skipped     minus a model of the Fn block only

All variants are built once and take turns step by step in one process, in an order drawn anew for
each step, since what ran before leaves the processor's caches behind; an overhead is the difference
to the baseline's time in the same turn. The time is that until the forward returns: on
a GPU by the clock, on a CPU the thread's own, so that other processes do not count.
"adds" is the overhead in units of one small `torch.add` of the same run, which tells machines and
loads apart from code.

On a CPU the kernels' PyTorch references run. With --triton they take the path that they take on a
GPU, up to the launch itself, which does nothing (`bench/stubbed_triton.py`): checks, grids,
Triton's dispatch. cache-dit's few torch ops run on 16 + 8 tokens, where next to nothing but their
dispatch is left, either. The wait for the flag, which both have on a GPU, is in neither.
"""

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

import dbcache
from bench.stubbed_triton import Launches, stubbed_triton

COMMIT = "_commit_kernel"
"""What a full step launches, and no other."""
WARMUP = "full step (warm-up)"
MISS = "full step (threshold miss)"
CACHED = "cached step"
STEPS, WARMUP_STEPS = 50, 4
ADDS = 20
"""Small additions that are timed together, as the unit."""


class NoOp(torch.nn.Module):
    """A block that returns its inputs, the hidden states shifted by `shift` unless that is 0."""

    shift = 0.0

    def forward(self, hidden_states, encoder_hidden_states, **_):
        """Return (encoder, hidden) as FLUX blocks do."""
        if self.shift:
            hidden_states = hidden_states + self.shift
        return encoder_hidden_states, hidden_states


def build(double: int, single: int, device: str) -> FluxTransformer2DModel:
    """Return a narrow FLUX transformer with no-op blocks."""
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=0,
        num_single_layers=0,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    model.transformer_blocks.extend(NoOp() for _ in range(double))
    model.single_transformer_blocks.extend(NoOp() for _ in range(single))
    model.transformer_blocks[0].shift = 1.0
    return model.eval().to(device)


def inputs(device: str) -> dict:
    """Return the forward's arguments for 16 image and 8 text tokens."""
    return {
        "hidden_states": torch.randn(1, 16, 16, device=device),
        "encoder_hidden_states": torch.randn(1, 8, 32, device=device),
        "pooled_projections": torch.randn(1, 32, device=device),
        "timestep": torch.full((1,), 0.5, device=device),
        "img_ids": torch.zeros(16, 3, device=device),
        "txt_ids": torch.zeros(8, 3, device=device),
        "return_dict": False,
    }


def options(kind: str) -> dict:
    """Return the options that make every step from WARMUP_STEPS on a step of `kind`."""
    return {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": 0.08,
        "max_warmup_steps": STEPS if kind == WARMUP else WARMUP_STEPS,
    }


@dataclass
class Variant:
    """One model that takes its turn, and its times in ms."""

    kind: str
    predictor: str
    engine: str
    model: Callable[..., object]
    new_request: Callable[[], None] = lambda: None
    cached_steps: Callable[[], int | None] = lambda: None
    launches: Launches | None = None
    cached: int = 0
    times: list[float] = field(default_factory=list)

    def step(self, index: int, arguments: dict, device: str) -> float:
        """Run the forward once and return its time in ms."""
        if self.kind == MISS:
            self.model.transformer_blocks[0].shift = 1.0 + index % 2
        if self.launches is not None:
            self.launches.cached = self.kind == CACHED
            commits = self.launches.counts[COMMIT]
        # on a CPU the thread's own time, in which other processes of a busy machine do not count
        clock = time.thread_time if device == "cpu" else time.perf_counter
        start = clock()
        self.model(**arguments)
        elapsed = clock() - start
        if device != "cpu":
            torch.accelerator.synchronize()
        if self.launches is not None:
            self.cached += self.launches.counts[COMMIT] == commits
        return elapsed * 1e3

    def begin_request(self) -> None:
        """Start anew."""
        self.cached = 0
        self.new_request()


def with_dbcache(kind: str, order: int, device: str, launches: Launches | None = None) -> Variant:
    """Return a model with dbcache enabled; stubbed `launches` tell what was cached."""
    model = build(19, 38, device)
    calibrator = dbcache.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    config = dbcache.DBCacheConfig(**options(kind))
    dbcache.enable(model, cache_config=config, calibrator_config=calibrator)
    variant = Variant(
        kind,
        name_of(order),
        "dbcache",
        model,
        lambda: dbcache.refresh_context(model, num_inference_steps=STEPS),
        lambda: len(dbcache.summary(model, logging=False).lanes[0].cached_steps),
        launches,
    )
    if launches is not None:  # the device, which is not there, has left no trace
        variant.cached_steps = lambda: variant.cached
    return variant


def with_cache_dit(kind: str, order: int, device: str) -> Variant:
    """Return a model with cache-dit enabled."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit

    model = build(19, 38, device)
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    config = cache_dit.DBCacheConfig(**options(kind), enable_separate_cfg=False)
    cache_dit.enable_cache(model, cache_config=config, calibrator_config=calibrator)
    return Variant(
        kind,
        name_of(order),
        "cache-dit",
        model,
        lambda: cache_dit.refresh_context(model, num_inference_steps=STEPS),
        lambda: len(cache_dit.summary(model, logging=False)[0].cached_steps),
    )


def name_of(order: int) -> str:
    """Return the predictor's name in the table."""
    return f"TaylorSeer {order}" if order else "reuse"


def measure(
    variants: list[Variant], requests: int, device: str, note: Callable[[], None] = lambda: None
) -> None:
    """Fill `times`: one entry per step after the warm-up, in the same order for all variants.

    Args:
        variants: take turns.
        requests: how many are timed.
        device: "cpu" or "cuda".
        note: is called after each of them.
    """
    arguments, order = inputs(device), random.Random(0)
    for request in range(requests + 1):
        for variant in variants:
            variant.begin_request()
        gc.collect()
        gc.disable()
        for step in range(STEPS):
            for variant in order.sample(variants, len(variants)):
                elapsed = variant.step(step, arguments, device)
                # the first request warms up caches of the process
                if request and step >= WARMUP_STEPS:
                    variant.times.append(elapsed)
        gc.enable()
        for variant in variants:
            expected = STEPS - WARMUP_STEPS if variant.kind == CACHED else 0
            if variant.cached_steps() not in (None, expected):
                raise RuntimeError(
                    f"bench.overhead: {variant.engine} must cache {expected} steps for "
                    f"'{variant.kind}', got {variant.cached_steps()}"
                )
        if request:
            note()


@dataclass(frozen=True)
class Row:
    """One line of the table; times in ms."""

    step: str
    predictor: str
    engine: str
    total_p50: float
    overhead_p20: float
    overhead_p50: float
    overhead_p80: float
    adds: float
    """The overhead's median in small additions."""


def row_of(variant: Variant, baseline: Variant, add_ms: float) -> Row:
    """Return the line of `variant`, its overhead taken turn by turn."""
    extra = [mine - plain for mine, plain in zip(variant.times, baseline.times, strict=True)]
    p20, _, _, p80 = statistics.quantiles(extra, n=5)
    total = statistics.median(variant.times)
    median = statistics.median(extra)
    name = variant.kind, variant.predictor, variant.engine
    return Row(*name, total, p20, median, p80, median / add_ms)


def small_adds(hidden_states: torch.Tensor, **_: object) -> None:
    """Add the small input to itself `ADDS` times."""
    for _ in range(ADDS):
        torch.add(hidden_states, hidden_states)


def run(
    requests: int,
    device: str,
    engines: list[str],
    launches: Launches | None = None,
    save: Callable[[list[Row], float], None] = lambda rows, add_ms: None,
) -> tuple[list[Row], float]:
    """Measure all variants.

    Args:
        requests: how many, of `STEPS` steps each.
        device: "cpu" or "cuda".
        engines: names of those that take turns.
        launches: where Triton is stubbed.
        save: is given after each request what is returned at the end.

    Returns:
        The table's lines, and the time of a small addition in ms.
    """
    add = Variant("small additions", "", "", small_adds)
    plain = Variant("plain model", "", "", build(19, 38, device))
    probe = Variant("Fn block only", "", "", build(1, 0, device))
    makers = {
        "dbcache": lambda *what: with_dbcache(*what, launches),
        "cache-dit": with_cache_dit,
    }
    variants = [
        makers[engine](kind, order, device)
        for kind in (WARMUP, MISS, CACHED)
        for order in (0, 1)
        for engine in engines
    ]

    def result() -> tuple[list[Row], float]:
        add_ms = statistics.median(add.times) / ADDS
        rows = [row_of(plain, plain, add_ms), row_of(probe, probe, add_ms)]
        rows += [row_of(v, probe if v.kind == CACHED else plain, add_ms) for v in variants]
        return rows, add_ms

    with torch.no_grad():
        measure([add, plain, probe, *variants], requests, device, lambda: save(*result()))
    return result()


def header(device: str) -> str:
    """Return the first line of the table: what ran where."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    versions = [f"dbcache {dbcache.__version__}"]
    for package in ("torch", "diffusers", "cache-dit"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} (not installed)")
    return " | ".join(["#", name, *versions, time.strftime("%Y-%m-%d")]).replace("# |", "#", 1)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--requests", type=int, default=20, help="of 50 steps each")
    parser.add_argument("--engines", nargs="+", default=["dbcache", "cache-dit"])
    parser.add_argument("--triton", action="store_true", help="on a CPU, with stubbed launches")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the lines here, after each request"
    )
    arguments = parser.parse_args()
    if arguments.triton and arguments.device != "cpu":
        parser.error("--triton stubs launches on a CPU; on a GPU Triton runs anyway")
    torch.set_num_threads(1)

    def title(add_ms: float) -> str:
        text = f"{header(arguments.device)} | small torch.add {add_ms * 1e3:.1f} us"
        return text + " | Triton's path, launches stubbed" * arguments.triton

    def save(rows: list[Row], add_ms: float) -> None:
        if arguments.json:
            lines = [asdict(row) for row in rows]
            result = {"header": title(add_ms), "add_ms": add_ms, "rows": lines}
            arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")

    with stubbed_triton() if arguments.triton else nullcontext() as launches:
        rows, add_ms = run(arguments.requests, arguments.device, arguments.engines, launches, save)
    print(title(add_ms))
    columns = f"{'p50 ms':>8}{'overhead':>10}{'adds':>7}  p20-p80"
    print(f"{'step':<28}{'predictor':<14}{'engine':<11}{columns}")
    for row in rows:
        times = f"{row.total_p50:8.3f}{row.overhead_p50:10.3f}{row.adds:7.0f}"
        spread = f"{row.overhead_p20:.3f}-{row.overhead_p80:.3f}"
        print(f"{row.step:<28}{row.predictor:<14}{row.engine:<11}{times}  {spread}")


if __name__ == "__main__":
    main()
