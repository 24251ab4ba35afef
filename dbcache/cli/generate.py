"""``dbcache generate MODEL --prompt ...``: any pipeline of diffusers, with the cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dbcache.cli.outcome import DTYPES, Outcome, check_writable, pair

HELP = "generate images, videos or audio with a pipeline of diffusers, with the cache on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("model", help="a folder of a pipeline, or its name on the Hugging Face hub")
    what = parser.add_argument_group("what to generate")
    what.add_argument("--prompt")
    what.add_argument("--negative-prompt")
    what.add_argument("--image", type=Path, help="image to start from, where the pipeline does")
    what.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's)")
    what.add_argument("--height", type=int)
    what.add_argument("--width", type=int)
    what.add_argument("--frames", type=int, help="frames of a video")
    what.add_argument("--guidance-scale", type=float)
    what.add_argument("--seed", type=int, default=0)
    what.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="others",
        help="any other argument of the pipeline's call; the value is JSON, @FILE for an array "
        "of .npy or a tensor of .pt, or else text",
    )  # fmt: skip
    cache = parser.add_argument_group("the cache").add_mutually_exclusive_group()
    cache.add_argument(
        "--cache", default="default", metavar="OPTIONS",
        help="'none', 'default', a level of quality (high, balanced, fast), or options as in "
        "Fn_compute_blocks=1,residual_diff_threshold=0.12",
    )  # fmt: skip
    cache.add_argument("--config", type=Path, help="a file of settings, .yaml or .json")
    cache.add_argument("--schedule", type=Path, help="a file that dbcache.tune wrote")
    parser.add_argument("--target", help="row of the schedule, as in 2x or balanced")
    how = parser.add_argument_group("how to run it")
    how.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU")
    how.add_argument("--device", help="cpu or cuda; the GPU where there is one")
    how.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    how.add_argument("--quantize", metavar="TYPE", help="weights, as in int8_weight_only")
    how.add_argument("--offload", action="store_true", help="keep idle models in the CPU's memory")
    how.add_argument(
        "--parallel", metavar="SIZES", help="as in ulysses=2 or tp=2,cfg=2, under torchrun"
    )
    how.add_argument(
        "--parallel-modules", nargs="+", metavar="NAME",
        help="with --parallel: spread these, too, as text_encoder vae controlnet",
    )  # fmt: skip
    how.add_argument("--compare", action="store_true", help="also without the cache; times, PSNR")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out", type=Path, help="file, or folder of images (default: out.png, .mp4, .wav)"
    )
    out.add_argument("--fps", type=int, default=16, help="frames per second of a video")
    out.add_argument("--rate", type=int, default=44100, help="samples per second of audio")
    out.add_argument("--report", type=Path, help="write the page of `dbcache.report` there")
    out.add_argument("--summary", type=Path, help="write the summary as JSON there")
    out.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> Outcome:
    """Load, generate, save, and tell what was cached."""
    from dbcache.cli.media import check_ending
    from dbcache.cli.pipelines import ranks

    _check(arguments)
    check_ending(arguments.out)
    settings = _settings(arguments)
    with ranks(arguments.parallel is not None) as is_first:
        return _generate(arguments, settings, is_first)


def _generate(
    arguments: argparse.Namespace, settings: dict[str, Any] | None, is_first: bool
) -> Outcome:
    """Do what `run` does, on one of the ranks; the first tells and saves."""
    import dbcache
    from dbcache.cli.pipelines import Runner, enabled

    runner = Runner.load(arguments)
    if arguments.quantize is not None:
        for part in runner.transformers():
            dbcache.quantize(part, quant_type=arguments.quantize)
    data: dict[str, Any] = {"model": arguments.model, "pipeline": type(runner.pipe).__name__}
    lines: list[str] = []
    if arguments.compare:
        plain = runner.run()
        data |= {"plain_seconds": plain.seconds}
        data["plain_files"] = _save(arguments, plain, "-plain") if is_first else []
    if settings is not None:
        with enabled(runner.pipe, settings):
            if arguments.compile:
                dbcache.compile(runner.pipe)
            result = runner.run(warm=arguments.compile)
            found = dbcache.summary(runner.pipe, logging=False)
            data |= {"summary": found.to_dict(), "settings": dbcache.strify(runner.pipe)}
            if arguments.report is not None and is_first:
                data["report"] = str(dbcache.report(runner.pipe, arguments.report))
            if arguments.summary is not None and is_first:
                arguments.summary.write_text(found.to_json() + "\n", encoding="utf-8")
        lines.append(str(found))
    else:
        if arguments.compile:
            dbcache.compile(runner.pipe)
        result = runner.run(warm=arguments.compile)
    if not is_first:
        return Outcome("", {})
    data |= {"seconds": result.seconds, "files": _save(arguments, result)}
    if arguments.compare:
        data |= {"speedup": data["plain_seconds"] / result.seconds, "psnr": plain.psnr(result)}
        psnr = data["psnr"]
        lines.append(
            f"plain {plain.seconds:.2f} s, with these settings {result.seconds:.2f} s: "
            f"{data['speedup']:.2f}x" + (f", PSNR {psnr:.1f} dB" if psnr is not None else "")
        )
    lines.append(f"{result.seconds:.2f} s for {', '.join(data['files'])}")
    if "report" in data:
        lines.append(f"report: {data['report']}")
    return Outcome("\n".join(lines), data)


def _check(arguments: argparse.Namespace) -> None:
    """Raise a ValueError for numbers that cannot be, before anything is loaded."""
    for name in ("steps", "height", "width", "frames", "fps", "rate"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    for name in ("image", "config", "schedule"):
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{name}: there is no file {path}")
    for name in ("out", "report", "summary"):
        check_writable(f"--{name}", getattr(arguments, name))
    for name in ("report", "summary"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"--{name}: there is no folder {path.parent}; make it")
        if path is not None and arguments.cache == "none":
            raise ValueError(f"--{name} needs the cache, got --cache none")


def _settings(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the keyword arguments of `enable`, None without a cache."""
    import dbcache

    if arguments.parallel_modules and arguments.parallel is None:
        raise ValueError("--parallel-modules needs sizes; give --parallel, too")
    if arguments.target is not None and arguments.schedule is None:
        raise ValueError("--target is a row of a schedule; give --schedule, too")
    if arguments.schedule is not None:
        found = {"schedule": arguments.schedule}
        if arguments.target is not None:
            found["target"] = arguments.target
    elif arguments.config is not None:
        found = dbcache.load_configs(arguments.config)
    elif arguments.cache == "none":
        if arguments.parallel is not None:
            raise ValueError("--parallel needs the cache; leave out --cache none")
        return None
    elif arguments.cache == "default":
        found = {}
    elif "=" in arguments.cache:
        found = dbcache.load_configs(dict(pair(text) for text in arguments.cache.split(",")))
    else:
        found = {"level": arguments.cache}
    if arguments.parallel is not None:
        sizes = dict(pair(text) for text in arguments.parallel.split(","))
        if arguments.parallel_modules:
            sizes["extra_parallel_modules"] = arguments.parallel_modules
        found["parallelism_config"] = dbcache.load_parallelism_config({"parallelism_config": sizes})
    return found


def _save(arguments: argparse.Namespace, result: Any, more: str = "") -> list[str]:
    from dbcache.cli.media import file_of, save

    out = file_of(result.kind, arguments.out)
    out = out.with_name(f"{out.stem}{more}{out.suffix}")
    return list(map(str, save(result.kind, result.entries, out, arguments.fps, arguments.rate)))
