"""The kernels against the PyTorch ops that the peers run, and against the memory's own speed.

    python -m bench.run kernels [--shapes flux-1024 wan-720p ...] [--ops predict ...]

Each op (a row of the tables that `bench/kernel_ops.py` lists) at each shape (`bench/shapes.py`) is
first compared with its reference; what differs is refused: it is not timed, and the program ends
with status 1. Then take turns, with buffers that rotate so that none is still in the cache:

    dbcache    the Triton kernel; on a CPU the reference, which says nothing about the kernel
    eager      the PyTorch sequence of the peers
    compiled   the same under torch.compile; on a CPU only with --compile

`of floor` is the least time in which the bytes that must move can move, over the time measured: the
bytes over the bandwidth of a large copy on this device, read and write counted, measured first. An
op that only reads can pass 100 %. `x eager` and `x compiled` say how many times as long those take;
`graph` is the time in a captured CUDA graph, of ops below 0.1 ms; `host` is what a call costs the
host. With `--tune`, a config is first chosen for each op and shape, and kept (`kernels/tuning.py`).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

import dbcache
from bench import shapes as known_shapes
from bench.kernel_op import Draw, Inputs, KernelOp, Outputs
from bench.kernel_ops import OPS
from bench.shapes import DTYPES, SHAPES, Shape
from bench.timing import Timing, Variant, copy_bandwidth, measure, sets_needed
from dbcache.kernels.common.select import Backend
from dbcache.kernels.tuning import check_device, tune

TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}
"""Largest relative error against the reference: about a unit in the dtype's last place."""
REPEATS = {"cuda": 25, "cpu": 3}
SHAPES_BY_DEFAULT = {"cuda": tuple(SHAPES), "cpu": ("few-step-512",)}
OURS, EAGER, COMPILED = "dbcache", "eager", "compiled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    op: str
    shape: str
    dtype: str
    impl: str
    """What stands behind the name dbcache: triton or reference."""
    moved: int | None = None
    """Bytes that must move."""
    floor_ms: float | None = None
    """Those over the copy bandwidth."""
    error: float | None = None
    """Largest relative error against the reference."""
    refused: str | None = None
    """Why nothing was timed."""
    timings: dict[str, Timing]
    """By variant: dbcache, eager, compiled."""

    @property
    def gb_per_s(self) -> float | None:
        """Bytes that must move over the time it took, in 1e9 bytes per second."""
        return self.moved / self.timings[OURS].p50_ms / 1e6 if self.moved else None

    @property
    def of_floor(self) -> float | None:
        """Floor over the time it took, in percent."""
        return 100 * self.floor_ms / self.timings[OURS].p50_ms if self.floor_ms else None

    def times(self, variant: str) -> float | None:
        """How many times as long `variant` takes."""
        if variant not in self.timings:
            return None
        return self.timings[variant].p50_ms / self.timings[OURS].p50_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured how."""

    device: torch.device
    repeats: int
    compiled: bool
    seconds: float
    """No further line is begun after this time."""

    @property
    def impl(self) -> Backend:
        """What stands behind the name dbcache on the device."""
        return "triton" if self.device.type == "cuda" else "reference"


def difference(got: Outputs, expected: Outputs) -> float:
    """Return the largest relative difference, ||got - expected|| / ||expected||; inf for NaN."""
    largest = 0.0
    for mine, theirs in zip(got, expected, strict=False):
        if theirs is None and mine is None:
            continue
        if theirs is None or mine is None:
            return float("inf")
        x = torch.as_tensor(mine).float()
        y = torch.as_tensor(theirs).to(x.device).float()
        if x.shape != y.shape:
            return float("inf")
        norm = y.norm()
        error = ((x - y).norm() / norm if norm else x.norm()).item()
        largest = max(largest, error if error == error else float("inf"))
    return largest


def check(op: KernelOp, shape: Shape, settings: Settings) -> tuple[float, str | None]:
    """Compare op and peers' sequence with the reference; return the error and what is wrong."""

    def fresh() -> Inputs:
        return op.make(shape, Draw(settings.device, seed=1))

    # the op comes first: memory that held the right result must not lie about for it to be found
    x = fresh()
    got = op.results(x, op.call(x, settings.impl))
    x = fresh()
    expected = op.results(x, op.call(x, "reference"))
    error = difference(got, expected)
    if not error <= TOLERANCE[shape.dtype]:
        return error, f"differs from its reference by {error:.1e}"
    x = fresh()
    off = difference(op.eager_results(x, op.eager(x)), expected)
    if not off <= op.eager_tolerance:
        return error, f"the peers' sequence differs from the reference by {off:.1e}"
    return error, None


def time_row(op: KernelOp, shape: Shape, settings: Settings, bandwidth: float) -> Row:
    """Check one op at one shape, then time its variants."""
    row = Row(
        op=op.name,
        shape=shape.name,
        dtype=shape.dtype,
        impl=settings.impl,
        moved=op.moved(shape) if op.moved else None,
        timings={},
    )
    error, wrong = check(op, shape, settings)
    if wrong:
        return replace(row, error=error, refused=wrong)
    draw = Draw(settings.device)
    sets = [op.make(shape, draw) for _ in range(sets_needed(row.moved or 2**30, settings.device))]
    variants = [
        Variant(name=OURS, call=lambda i: op.call(sets[i % len(sets)], settings.impl)),
        Variant(
            name=EAGER, call=lambda i: op.eager(sets[i % len(sets)]), waits=op.eager_waits
        ),
    ]  # fmt: skip
    if settings.compiled and not op.eager_waits:
        torch.compiler.reset()
        compiled = torch.compile(op.eager, fullgraph=True, dynamic=False)
        variants.append(Variant(name=COMPILED, call=lambda i: compiled(sets[i % len(sets)])))
    return replace(
        row,
        error=error,
        floor_ms=row.moved / bandwidth * 1e3 if row.moved else None,
        timings=measure(variants, settings.device, settings.repeats),
    )


def run(
    ops: Iterable[KernelOp],
    shapes: Iterable[Shape],
    settings: Settings,
    bandwidth: float,
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure every op at every shape; print and `save` each line when it is there."""
    ops, rows, start = list(ops), [], time.monotonic()
    print(HEAD, flush=True)
    for shape in shapes:
        for op in ops:
            if time.monotonic() - start > settings.seconds:
                rows.append(_left_out(op, shape, settings, "no time left"))
            else:
                try:
                    rows.append(time_row(op, shape, settings, bandwidth))
                except torch.OutOfMemoryError:
                    rows.append(_left_out(op, shape, settings, "out of memory"))
            print(line(rows[-1]), flush=True)
            save(rows)
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def tune_all(
    ops: Iterable[KernelOp], shapes: Iterable[Shape], device: torch.device, seconds: float
) -> None:
    """Choose a config for each op at each shape, beginning none after `seconds`; print each."""
    wanted = dict.fromkeys(op.tuned for op in ops if op.tuned)
    start = time.monotonic()
    print(f"# tuning: {'op':<20}{'shape':<19}{'block':>6}{'warps':>6}{'ms':>9}{'x default':>11}")
    for shape in shapes:
        for op, slots in wanted:
            if time.monotonic() - start > seconds:
                print("# tuning: no time left", flush=True)
                return
            size, extra = (shape.batch, shape.hidden, shape.width), None
            if shape.encoder:
                extra = (shape.batch, shape.encoder, shape.width)
            name = f"{op} K={slots}" if op == "predict" else op
            start_of_line = f"# tuning: {name:<20}{shape.name:<19}"
            try:
                choice = tune(
                    op, size, DTYPES[shape.dtype], slots=slots, encoder_shape=extra, device=device
                )
            except torch.OutOfMemoryError:
                print(f"{start_of_line} left out: out of memory", flush=True)
                continue
            finally:
                torch.cuda.empty_cache()
            block, warps = choice.launch
            took = choice.times[choice.launch]
            print(f"{start_of_line}{block:6}{warps:6}{took:9.4f}{choice.gain:11.3f}", flush=True)


def _left_out(op: KernelOp, shape: Shape, settings: Settings, why: str) -> Row:
    return Row(
        op=op.name,
        shape=shape.name,
        dtype=shape.dtype,
        impl=settings.impl,
        refused=why,
        timings={},
    )


HEAD = (
    f"{'op':<18}{'shape':<19}{'dtype':<6}{'impl':<10}{'p50 ms':>9}  {'p20-p80':<15}{'GB/s':>6}"
    f"{'of floor':>9}{'x eager':>9}{'x compiled':>11}{'graph ms':>10}{'host us':>9}"
)


def line(row: Row) -> str:
    """Return one line of the table."""
    start = f"{row.op:<18}{row.shape:<19}{row.dtype:<6}{row.impl:<10}"
    if row.refused:
        why = "left out" if row.error is None else "REFUSED"
        return f"{start} {why}: {row.refused}"
    ours = row.timings[OURS]

    def cell(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    return (
        f"{start}{ours.p50_ms:9.4f}  {f'{ours.p20_ms:.4f}-{ours.p80_ms:.4f}':<15}"
        f"{cell(row.gb_per_s, '.0f', 6)}{cell(row.of_floor, '.0f', 7)} %"
        f"{cell(row.times(EAGER), '.2f', 9)}{cell(row.times(COMPILED), '.2f', 11)}"
        f"{cell(ours.graph_ms, '.4f', 10)}{cell(ours.host_us, '.1f', 9)}"
    )


def versions(device: torch.device) -> dict[str, str]:
    """Return what was measured where."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        sha = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        sha = ""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "python": platform.python_version(),
        "dbcache": f"{dbcache.__version__}+{sha}" if sha else dbcache.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def header(about: dict[str, str], bandwidth: float, device: torch.device) -> str:
    """Return the lines above the table."""
    parts = [about["device"], *(f"{k} {about[k]}" for k in ("torch", "triton", "dbcache"))]
    text = f"# {' | '.join(parts)} | {about['date']}\n# copy: {bandwidth / 1e9:.0f} GB/s"
    if device.type != "cuda":
        text += (
            "\n# CPU: these are the ops' PyTorch references, not the Triton kernels; few repeats."
            "\n# Floor and factors are those of this CPU; they say nothing about a GPU."
        )
    return text


def as_json(rows: list[Row], about: dict[str, str], bandwidth: float) -> dict[str, Any]:
    """Return everything that was measured, as plain values."""
    return {
        "about": about,
        "copy_gb_per_s": bandwidth / 1e9,
        "rows": [
            asdict(row)
            | {"gb_per_s": row.gb_per_s, "of_floor": row.of_floor}
            | {f"times_{name}": row.times(name) for name in (EAGER, COMPILED)}
            if not row.refused
            else asdict(row)
            for row in rows
        ],
    }


def chosen(names: list[str] | None) -> list[KernelOp]:
    """Return the ops whose name is or begins with one of `names`; all for None."""
    if names is None:
        return list(OPS.values())
    for name in names:
        if not any(known.startswith(name) for known in OPS):
            raise ValueError(
                f"bench.kernels: an op must be or begin one of {', '.join(OPS)}, got {name!r}"
            )
    return [op for known, op in OPS.items() if any(known.startswith(name) for name in names)]


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return 1 if an op was refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", help=f"{', '.join(SHAPES)}, or like 4096+512x3072")
    parser.add_argument("--ops", nargs="+", help=f"how they begin suffices: {', '.join(OPS)}")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    parser.add_argument("--repeats", type=int, help="turns of each variant")
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("--compile", action=yes_no, help="time torch.compile; yes on a GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no line after")
    parser.add_argument(
        "--tune", nargs="?", type=float, const=float("inf"), metavar="SECONDS",
        help="choose configs first, on a GPU; begin none after",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw `of floor`, as PNG")
    arguments = parser.parse_args(argv)
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        ops = chosen(arguments.ops)
        if arguments.tune is not None:
            if kind != "cuda":
                raise ValueError("--tune needs a GPU: a CPU runs the references, not the kernels")
            check_device(kind)
        names = arguments.shapes or SHAPES_BY_DEFAULT[kind]
        shapes = [known_shapes.parse(name) for name in names]
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    shapes = [replace(x, batch=arguments.batch, dtype=arguments.dtype) for x in shapes]
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    settings = Settings(
        device=device,
        repeats=arguments.repeats or REPEATS[kind],
        compiled=kind == "cuda" if arguments.compile is None else arguments.compile,
        seconds=arguments.seconds,
    )
    with torch.no_grad():
        bandwidth = copy_bandwidth(device)
        about = versions(device)
        print(header(about, bandwidth, device))

        def save(rows: list[Row]) -> None:
            if arguments.json:
                content = json.dumps(as_json(rows, about, bandwidth), indent=1)
                arguments.json.write_text(content + "\n", encoding="utf-8")

        if arguments.tune is not None:
            tune_all(ops, shapes, device, arguments.tune)
        rows = run(ops, shapes, settings, bandwidth, save)
    if arguments.plot:
        from bench.plot import draw_floors

        timed = [row for row in rows if row.of_floor is not None]
        draw_floors(timed, header(about, bandwidth, device), arguments.plot)
    return int(any(row.refused and row.error is not None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
