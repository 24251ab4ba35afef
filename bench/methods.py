"""All methods on the trained model at about 1.5x to 4x: speed against quality.

python -m bench.run methods      # what bench/results/methods.json lacks; then docs/methods.md
python -m bench.run methods --digits 1 --batches 1 --out /tmp/m.json     # a quick look

A level is a rule that fixes which steps are cached, so that predictors are compared at equal
decisions, cache-dit's too, in the same run and from the same seeds; methods that decide by
themselves bring options of their own per level. Each cell is measured in batches, a plain run
before the methods of each level, and the file is written after each batch: a run that was cut off
goes on where it was, and a method that is added to `METHODS` costs its own cells only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dbcache
from dbcache.demo import digits
from dbcache.demo.quality import DigitClassifier, psnr, ssim

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "methods.json"
CALIBRATIONS = ROOT / "calibrations"
"""At 50 steps, one file per policy: `python -m bench.policies --calibrate`."""
CALIBRATED = ("teacache", "magcache")
DOCS = ROOT.parent / "docs" / "methods.md"
BEGIN, END = "<!-- {} by bench/{}.py -->", "<!-- end of {} -->"
"""Around what a bench writes into a page."""
BEST_ROWS = "best rows"
BEST = 5
PEER = "cache-dit"

LEVELS: dict[str, dict[str, Any]] = {
    "1.5x": {"max_warmup_steps": 12, "max_continuous_cached_steps": 1},
    "2x": {"max_warmup_steps": 6, "max_continuous_cached_steps": 2},
    "3x": {"max_warmup_steps": 4, "max_continuous_cached_steps": 4},
    "4x": {"max_warmup_steps": 4, "max_continuous_cached_steps": 8},
}
"""At 50 steps; with a threshold of 1 the limits alone decide."""
COMMON: dict[str, Any] = {"Fn_compute_blocks": 1, "residual_diff_threshold": 1.0}

Options = dict[str, Any]
_FOCA: tuple[str, Options] = ("FoCaCalibratorConfig", {})


@dataclass(frozen=True)
class Method:
    """One row per level.

    Attributes:
        name: what the table calls it.
        calibrator: class name and fields of the predictor, in dbcache or in cache-dit; None reuses.
        engine: "dbcache" or "cache-dit".
        cache: fields of `DBCacheConfig` besides those of the level.
        levels: instead of the level's own fields, by level; levels left out are not measured.
        alone: whether the level's fields and those of `cache` are all there is.
    """

    name: str
    calibrator: tuple[str, Options] | None = None
    engine: str = "dbcache"
    cache: Options = field(default_factory=dict)
    levels: dict[str, Options] | None = None
    alone: bool = False

    def options(self, level: str) -> Options | None:
        """Return the fields of the cache's config at `level`, None where it is not measured."""
        own = LEVELS[level] if self.levels is None else self.levels.get(level)
        common = {} if self.alone else COMMON
        return None if own is None else {**common, **own, **self.cache}

    def settings(self, level: str) -> str:
        """Return what its records at `level` depend on; files by their names."""
        options = self.options(level) or {}
        files = ("calibration", "schedule")
        named = {k: Path(v).name if k in files else v for k, v in options.items()}
        return repr((sorted(named.items()), self.calibrator))


def _taylor(order: int, **fields: Any) -> tuple[str, Options]:
    return "TaylorSeerCalibratorConfig", {"taylorseer_order": order, **fields}


def _thresholds(*by_level: float) -> dict[str, Options]:
    return {k: {"residual_diff_threshold": x} for k, x in zip(LEVELS, by_level, strict=False)}


def calibration_of(policy: str) -> Path:
    """Return the file in which its calibration is kept."""
    return CALIBRATIONS / f"digits_{policy}.json"


def _policy(name: str, *by_level: float) -> Method:
    policy = name.lower()
    cache: Options = {"policy": policy, "max_warmup_steps": 4}
    if policy in CALIBRATED:
        cache["calibration"] = str(calibration_of(policy))
    return Method(f"{name}, FoCa", _FOCA, cache=cache, levels=_thresholds(*by_level))


METHODS = (
    Method("reuse"),
    Method("TaylorSeer 1", _taylor(1)),
    Method("TaylorSeer 2", _taylor(2)),
    Method("TaylorSeer 2, exact", _taylor(2, exact=True)),
    Method("Hermite 1", ("HermiteCalibratorConfig", {"hermite_order": 1})),
    Method("FoCa", _FOCA),
    Method("DMD", ("DMDCalibratorConfig", {})),
    Method("DMD, ridge 1e-6", ("DMDCalibratorConfig", {"dmd_ridge": 1e-6})),
    Method("Spectrum", ("SpectrumCalibratorConfig", {})),
    Method(
        "FoCa, by threshold",
        _FOCA,
        cache={"max_warmup_steps": 4},
        levels=_thresholds(0.08, 0.12, 0.25, 0.45),
    ),
    _policy("EasyCache", 0.012, 0.02, 0.04, 0.06),
    _policy("TeaCache", 0.02, 0.03, 0.06, 0.09),
    _policy("SeaCache", 0.06, 0.1, 0.2, 0.3),
    _policy("MagCache", 0.035, 0.06, 0.17, 0.3),
    Method(
        "DBPrune",
        cache={"max_warmup_steps": 4, "cache_type": "DBPrune"},
        levels=_thresholds(0.05, 0.08, 0.15),
    ),
    Method("reuse", None, PEER),
    Method("TaylorSeer 1", _taylor(1), PEER),
    Method("TaylorSeer 2", _taylor(2), PEER),
    Method("FoCa", _FOCA, PEER),
    Method("DMD", ("DMDCalibratorConfig", {}), PEER),
)


@dataclass
class Run:
    """One call of the pipeline."""

    images: torch.Tensor
    seconds: float
    cpu_seconds: float
    cached: float = 0


class Bench:
    """Draws batches of digits with each method.

    Args:
        steps: of a call.
        per_digit: images of each digit in a batch.
        device: where.
        weights: folder of the model.
    """

    def __init__(
        self, steps: int, per_digit: int, device: str, weights: Path = digits.WEIGHTS
    ) -> None:
        self.pipe: Any = digits.load_pipeline(weights, device=device)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps = steps
        self.labels = torch.arange(digits.NUM_CLASSES).repeat(per_digit)
        self.classifier: Any = DigitClassifier()

    def images(self, seed: int) -> torch.Tensor:
        """Return the images (B, H, W), or videos (B, T, H, W), of one call, on the CPU."""
        generator = torch.Generator("cpu").manual_seed(seed)
        call = {"num_inference_steps": self.steps, "generator": generator}
        return digits.decode(self.pipe(**digits.prompt(self.labels.tolist()), **call).images)

    def draw(self, seed: int) -> Run:
        """Return the images of one call and what it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        images = self.images(seed)  # on the CPU, so it waits for the device
        return Run(images, time.perf_counter() - wall, time.process_time() - cpu)

    def run(self, method: Method, options: Options, seed: int) -> Run:
        """Draw with a method switched on."""
        return ENGINES[method.engine](self, method, options, seed)

    def measure(self, method: Method, level: str, seed: int, full: Run) -> dict[str, Any]:
        """Return the record of one cell and batch; `full` is the plain run before it."""
        options = method.options(level)
        assert options is not None
        run = self.run(method, options, seed)
        return {
            "level": level,
            "engine": method.engine,
            "method": method.name,
            "settings": method.settings(level),
            "seed": seed,
            "cached": run.cached,
            "seconds": run.seconds,
            "full_seconds": full.seconds,
            "cpu_seconds": run.cpu_seconds,
            "full_cpu_seconds": full.cpu_seconds,
            "psnr": psnr(run.images, full.images),
            "ssim": ssim(run.images, full.images),
            "accuracy": self.classifier.accuracy(run.images, self.labels),
            "full_accuracy": self.classifier.accuracy(full.images, self.labels),
        }


def _with_dbcache(bench: Bench, method: Method, options: Options, seed: int) -> Run:
    calibrator = None
    if method.calibrator is not None:
        name, fields = method.calibrator
        calibrator = getattr(dbcache, name)(**fields)
    dbcache.enable(bench.pipe, calibrator_config=calibrator, **options)
    run = bench.draw(seed)
    lanes = dbcache.summary(bench.pipe, logging=False).lanes
    run.cached = statistics.mean(len(lane.cached_steps) for lane in lanes)
    dbcache.disable(bench.pipe)
    return run


def _with_cache_dit(bench: Bench, method: Method, options: Options, seed: int) -> Run:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit

    config = cache_dit.DBCacheConfig(**options, num_inference_steps=bench.steps)
    calibrator = None
    if method.calibrator is not None:
        name, fields = method.calibrator
        calibrator = getattr(cache_dit, name)(**fields)
    cache_dit.enable_cache(bench.pipe, cache_config=config, calibrator_config=calibrator)
    run = bench.draw(seed)
    run.cached = len(cache_dit.summary(bench.pipe.transformer, logging=False)[-1].cached_steps)
    cache_dit.disable_cache(bench.pipe)
    return run


ENGINES: dict[str, Callable[[Bench, Method, Options, int], Run]] = {
    "dbcache": _with_dbcache,
    PEER: _with_cache_dit,
}


def facts(device: str) -> dict[str, str]:
    """Return what the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return {
        "device": name, "threads": str(torch.get_num_threads()), "torch": torch.__version__,
        "cache-dit": version("cache-dit"),
    }  # fmt: skip


def missing(
    methods: tuple[Method, ...], records: list[dict[str, Any]], level: str, seed: int
) -> list[Method]:
    """Return the methods of which the batch has no record with these settings."""
    done = {(r["level"], r["engine"], r["method"], r["seed"], r["settings"]) for r in records}
    found = []
    for method in methods:
        options = method.options(level)
        settings = method.settings(level)
        if options is not None and (level, method.engine, method.name, seed, settings) not in done:
            found.append(method)
    return found


def table(methods: tuple[Method, ...], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per level and method, of the records with its settings, best PSNR first."""
    rows = []
    for level in sorted({record["level"] for record in records}):
        of_level = []
        for method in methods:
            settings = method.settings(level)
            key = (level, method.engine, method.name, settings)
            cells = [
                r for r in records if key == (r["level"], r["engine"], r["method"], r["settings"])
            ]
            if not cells:
                continue
            means = {
                name: statistics.mean(cell[name] for cell in cells)
                for name in ("cached", "psnr", "ssim", "accuracy", "full_accuracy")
            }
            wall, cpu = (
                statistics.median(cell[f"full_{name}"] / cell[name] for cell in cells)
                for name in ("seconds", "cpu_seconds")
            )
            of_level.append(
                {"level": level, "engine": method.engine, "method": method.name}
                | {"batches": len(cells), "speedup": wall, "cpu_speedup": cpu, **means}
            )
        rows += sorted(of_level, key=lambda row: -row["psnr"])
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Return the table and what it was measured on."""
    facts, rows, batch = result["about"], result["rows"], result["images_per_batch"]
    most = max(row["batches"] for row in rows)
    accuracy = statistics.mean(row["full_accuracy"] for row in rows)
    lines = [
        f"{batch * most} {result.get('what', 'images of the digits model')}, "
        f"{result['steps']} steps, batches of {batch}; "
        f"{', '.join(f'{k} {v}' for k, v in facts.items())}. "
        f"Accuracy of the plain model: {accuracy:.1%}.",
        "",
        "| level | method | of | cached | wall | CPU time | PSNR dB | SSIM | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        fewer = f" ({batch * row['batches']} images)" if row["batches"] < most else ""
        lines.append(
            f"| {row['level']} | {row['method']}{fewer} | {row['engine']} | "
            f"{row['cached']:.4g}/{result['steps']} | {row['speedup']:.2f}x | "
            f"{row['cpu_speedup']:.2f}x | {row['psnr']:.1f} | {row['ssim']:.4f} | "
            f"{row['accuracy']:.1%} |"
        )
    return "\n".join(lines)


def best_rows(result: dict[str, Any], speed: str = "speedup") -> str:
    """Return a short table per level: the methods closest to the plain images, reuse, the peer's.

    Args:
        result: content of the file.
        speed: "speedup", of wall time, or "cpu_speedup".
    """
    lines: list[str] = []
    for level in dict.fromkeys(row["level"] for row in result["rows"]):
        rows = [r for r in result["rows"] if (r["level"], r["engine"]) == (level, "dbcache")]
        peers = [r for r in result["rows"] if (r["level"], r["engine"]) == (level, PEER)]
        lines += [f"### About {level}", "", "| method | cached | speed-up | PSNR dB | SSIM |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        reuse = [r for r in rows[BEST:] if r["method"] == "reuse"]
        for row in sorted(rows[:BEST] + reuse + peers[:1], key=lambda row: -row["psnr"]):
            of = "" if row["engine"] == "dbcache" else f" of {PEER}"
            lines.append(
                f"| {row['method']}{of} | {row['cached']:.4g}/{result['steps']} | "
                f"{row[speed]:.2f}x | {row['psnr']:.1f} | {row['ssim']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def as_json(result: dict[str, Any]) -> str:
    """Return the file's text, a record or a row per line, so that a change of it can be read."""

    def lines(value: Any) -> str:
        if not isinstance(value, list):
            return json.dumps(value)
        return "[\n" + ",\n".join(f"  {json.dumps(each)}" for each in value) + "\n ]"

    return "{\n" + ",\n".join(f" {json.dumps(k)}: {lines(v)}" for k, v in result.items()) + "\n}\n"


def write_docs(path: Path, text: str, name: str, bench: str = "methods") -> None:
    """Put `text` between the markers of a page for the text `name` of a bench.

    Raises:
        ValueError: the page lacks them.
    """
    page = path.read_text(encoding="utf-8")
    begin, end = BEGIN.format(name, bench), END.format(name)
    if begin not in page or end not in page:
        raise ValueError(f"bench.{bench}: {path} must contain {begin!r} and {end!r}")
    before, rest = page.split(begin)
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


def measure_all(
    bench: Bench,
    methods: tuple[Method, ...],
    levels: list[str],
    result: dict[str, Any],
    batches: int,
    save: Callable[[], None],
) -> None:
    """Add the missing records to `result`, one level of one batch after the other."""
    for seed in range(batches):
        for number, level in enumerate(levels):
            todo = missing(methods, result["records"], level, seed)
            if not todo:
                continue
            full = bench.draw(seed)
            first = (seed + number) % len(todo)  # so that no one always runs first
            for method in todo[first:] + todo[:first]:
                record = bench.measure(method, level, seed, full)
                result["records"].append(record)
                print(
                    f"{level:5}{method.engine:10}{method.name:20}batch {seed}: "
                    f"{record['psnr']:.2f} dB, {record['full_seconds'] / record['seconds']:.2f}x",
                    flush=True,
                )
            save()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.methods", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--digits", type=int, default=1, help="images per digit and batch")
    parser.add_argument(
        "--batches",
        type=int,
        default=10,
        help="batches, of seeds 0, 1, ...; 0: docs only",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="records, read and written")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="names of methods to measure")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=[*LEVELS])
    parser.add_argument("--docs", type=Path, help="page to put the table in")
    args = parser.parse_args()
    docs = args.docs or (DOCS if args.out == RESULTS else None)

    result: dict[str, Any] = {
        "steps": args.steps, "images_per_batch": 10 * args.digits, "about": facts(args.device),
        "records": [],
    }  # fmt: skip
    if args.out.exists():
        before = json.loads(args.out.read_text())
        same = ("steps", "images_per_batch", "about")
        if args.batches and any(before[key] != result[key] for key in same):
            raise SystemExit(f"bench.methods: {args.out} is of other settings; give another --out")
        result = before

    def save() -> None:
        result["rows"] = table(METHODS, result["records"])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(as_json(result))
        args.out.with_suffix(".md").write_text(markdown(result) + "\n")

    methods = tuple(m for m in METHODS if not args.only or m.name in args.only)
    if args.batches:
        bench = Bench(args.steps, args.digits, args.device)
        measure_all(bench, methods, args.levels, result, args.batches, save)
    save()
    print(markdown(result))
    if docs is not None:
        write_docs(docs, best_rows(result), BEST_ROWS)


if __name__ == "__main__":
    main()
