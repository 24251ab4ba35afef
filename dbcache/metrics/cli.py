"""Command line: ``dbcache-metrics psnr ssim -i1 plain/ -i2 cached/``.

Names of the metrics and of the flags are those of cache-dit-metrics.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from dbcache.command import DONE, FAILED, error_text, run_command
from dbcache.metrics.inputs import VIDEO_ENDINGS, MetricWarning, existing, files_in
from dbcache.metrics.runs import COLUMNS, PROMPTED, WITH_REFERENCE, Runs, Settings
from dbcache.metrics.tables import Column, Table
from dbcache.metrics.timings import Timings, ratio_heading, ratios

EPILOG = """examples:
  dbcache-metrics psnr ssim -i1 plain.png -i2 cached.png
  dbcache-metrics all -r runs/plain -d runs
  dbcache-metrics psnr -v1 plain.mp4 -v2 cached.mp4 --json
  dbcache-metrics clip_score -i2 cached/ -p prompts.txt
  dbcache-metrics psnr -r runs/plain -d runs -plog times.json -ptags time --cal-speedup -table
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser; its help needs neither torch nor an image library."""
    p = argparse.ArgumentParser(
        prog="dbcache-metrics",
        description="How good images and videos are: against a reference, or for their prompts.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "metrics",
        nargs="+",
        choices=["all", *COLUMNS],
        metavar="METRIC",
        help=f"{', '.join(COLUMNS)}, or all: every one that the inputs allow",
    )
    _add_inputs(p.add_argument_group("inputs"))
    _add_models(p.add_argument_group("models"))
    _add_times(p.add_argument_group("times"))
    out = p.add_argument_group("output").add_mutually_exclusive_group()
    out.add_argument(
        "--format", choices=["text", "markdown", "csv", "json"], default="text", help="of the table"
    )
    out.add_argument(
        "--gen-markdown-table", "-table", dest="format", action="store_const", const="markdown",
        help="the table in Markdown",
    )  # fmt: skip
    out.add_argument("--json", dest="format", action="store_const", const="json", help="JSON")
    p.add_argument(
        "--enable-verbose", "-verbose", action="store_true", help="say on stderr what is computed"
    )
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    same = "for command lines of cache-dit, changes nothing here: "
    p.add_argument("--summary", "-s", action="store_true", help=same + "the table always comes")
    p.add_argument(
        "--psnr-type", choices=["custom", "skimage"], help=same + "both are the same number"
    )
    return p


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--img-true", "-i1", "--ref-img-dir", "-r", dest="image_true", metavar="PATH",
        help="reference: an image or a folder of images",
    )  # fmt: skip
    group.add_argument(
        "--img-test", "-i2", dest="image_test", metavar="PATH", action="append", default=[],
        help="image or folder in question; may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--img-source-dir", "-d", dest="image_parent", metavar="PATH",
        help="folder whose sub-folders are all in question, except the reference",
    )  # fmt: skip
    group.add_argument(
        "--video-true", "-v1", "--ref-video", "-rv", dest="video_true", metavar="PATH",
        help="reference: a video or a folder of videos",
    )  # fmt: skip
    group.add_argument(
        "--video-test", "-v2", dest="video_test", metavar="PATH", action="append", default=[],
        help="video or folder in question; may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--video-source-dir", "-vd", dest="video_parent", metavar="PATH",
        help="folder whose videos are all in question, except the reference",
    )  # fmt: skip
    group.add_argument(
        "--prompt-true", "-p", "--ref-prompt-true", "-rp", dest="prompts", metavar="FILE",
        help="text file with one prompt per line, for clip_score and image_reward",
    )  # fmt: skip


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--weights", metavar="PATH", help="folder of the files of lpips and fid")
    group.add_argument("--lpips-net", choices=["alex", "vgg"], default="alex", help="backbone")
    group.add_argument("--clip-model", metavar="PATH", help="folder or hub name of a CLIP model")
    group.add_argument("--reward-model", metavar="PATH", help="folder of ImageReward.pt")
    group.add_argument("--device", help="cpu, cuda, ...; the GPU where there is one")
    group.add_argument(
        "--fid-batch-size", "-b", type=int, default=16, metavar="N", help="images at once; 16"
    )


def _add_times(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--perf-log", "-plog", metavar="FILE", help="log or JSON summary with the times of the runs"
    )
    group.add_argument(
        "--perf-tags", "-ptags", nargs="+", default=[], metavar="TAG", help="what to read, as time"
    )
    group.add_argument(
        "--extra-perf-tags", "-extra-ptags", nargs="+", default=[], metavar="TEXT",
        help="text that a line of the log must hold as well",
    )  # fmt: skip
    group.add_argument(
        "--cal-speedup", action="store_true", help="add baseline / run for every tag"
    )
    group.add_argument(
        "--baseline", metavar="NAME",
        help="run that speed-ups are against; the reference if the log has it, else the slowest",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 where not all could be computed, or 130 after Ctrl-C."""
    p = parser()
    arguments = p.parse_args(argv)
    _check(p, arguments)
    if arguments.debug:
        return _run(arguments)  # Python shows the traceback
    return run_command("dbcache-metrics", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    table, unavailable = _compute(arguments)
    if any(COLUMNS.keys() & row for row in table.rows) or arguments.format == "json":
        print(getattr(table, f"to_{arguments.format}")())
    for metric, reason in unavailable.items():
        if arguments.debug:
            raise reason
        print(f"dbcache-metrics: no {metric}: {error_text(reason)}", file=sys.stderr)
    return FAILED if unavailable else DONE


def _check(p: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a usage error where the inputs do not serve the metrics."""
    images = bool(arguments.image_test or arguments.image_parent)
    video = bool(arguments.video_test or arguments.video_parent)
    if images == video:
        p.error("give images (-i2 or -d) or videos (-v2 or -vd)" + ", not both" * images)
    if video and (arguments.image_true or arguments.prompts):
        p.error("videos go with -v1 (-rv); -i1 (-r) and -p (-rp) are for images")
    if images and arguments.video_true:
        p.error("-v1 (-rv) is for videos")
    reference = arguments.video_true if video else arguments.image_true
    for metric in arguments.metrics:
        if metric in WITH_REFERENCE and not reference:
            p.error(f"{metric} needs a reference: {'-v1 (-rv)' if video else '-i1 (-r)'}")
        if metric in PROMPTED and not arguments.prompts:
            p.error(f"{metric} needs images and a file of prompts: -p (-rp)")
    if not reference and not arguments.prompts:
        p.error("all needs a reference (-i1 or -v1) or a file of prompts (-p)")
    if arguments.perf_log is None and (arguments.perf_tags or arguments.cal_speedup):
        p.error("-ptags and --cal-speedup need -plog")
    if arguments.perf_log is not None and not arguments.perf_tags:
        p.error("-plog needs -ptags, as -ptags time")


def _compute(arguments: argparse.Namespace) -> tuple[Table, dict[str, Exception]]:
    video = bool(arguments.video_test or arguments.video_parent)
    reference = arguments.video_true if video else arguments.image_true
    if arguments.prompts is not None and not Path(arguments.prompts).is_file():
        raise FileNotFoundError(f"-p: {arguments.prompts!r} must be a file of prompts, not found")
    tests = _tests(arguments, video, reference)
    times = None
    if arguments.perf_log is not None:  # read first: a wrong path should not cost a run
        times = Timings(arguments.perf_log, arguments.perf_tags, arguments.extra_perf_tags)
    settings = Settings(
        reference=reference,
        prompts=arguments.prompts,
        video=video,
        weights=arguments.weights,
        lpips_net=arguments.lpips_net,
        clip_model=arguments.clip_model,
        reward_model=arguments.reward_model,
        device=arguments.device,
        batch_size=arguments.fid_batch_size,
        report=(lambda text: print(text, file=sys.stderr)) if arguments.enable_verbose else None,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MetricWarning)
        runs = Runs(settings)
        metrics = runs.expand(arguments.metrics, tests)
        rows = runs.rows(metrics, tests)
    notes = list(dict.fromkeys(str(warning.message) for warning in caught))
    columns = [COLUMNS[metric] for metric in metrics if metric not in runs.unavailable]
    always = [Column("name", "run"), Column("n", "frames" if video else "images")]
    facts = {
        "reference": reference,
        "notes": notes,
        "unavailable": {metric: str(error) for metric, error in runs.unavailable.items()},
    }
    table = Table([*always, *columns], rows, facts)
    if times is not None:
        _add_figures(table, times, arguments, reference, notes)
    if columns:
        table.sort(columns[0])
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return table, runs.unavailable


def _tests(
    arguments: argparse.Namespace, video: bool, reference: str | None
) -> list[tuple[str, str]]:
    """Return name and path of everything in question."""
    given = arguments.video_test if video else arguments.image_test
    parent = arguments.video_parent if video else arguments.image_parent
    flag, parent_flag = ("-v2", "-vd") if video else ("-i2", "-d")
    paths = [existing(path, flag) for path in given]
    if parent is not None:
        folder = existing(parent, parent_flag)
        if not folder.is_dir():
            raise ValueError(f"{parent_flag}: must be a folder, got {parent}")
        if video:
            found = files_in(folder, VIDEO_ENDINGS, parent_flag)
        else:
            found = sorted(path for path in folder.iterdir() if path.is_dir())
        own = None if reference is None else Path(reference).expanduser().resolve()
        chosen = [path for path in found if path.resolve() != own]
        if not chosen:
            what = "videos" if video else "sub-folders"
            raise ValueError(f"{parent}: must hold {what} beside the reference; has none")
        paths += chosen
    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return list(zip(names, map(str, paths), strict=True))


def _add_figures(
    table: Table,
    times: Timings,
    arguments: argparse.Namespace,
    reference: str | None,
    notes: list[str],
) -> None:
    """Add what the log says of each run, and speed-ups where they are asked for."""
    figures = {str(row["name"]): times.figures(str(row["name"])) for row in table.rows}
    absent = [name for name, own in figures.items() if not own]
    if len(absent) == len(figures):
        raise ValueError(
            f"{times.path}: must have figures of a run, got none of {', '.join(absent)}"
        )
    if absent:
        notes.append(f"{times.path} has no {' or '.join(times.tags)} of {', '.join(absent)}")
    for tag in times.tags:
        table.columns.append(Column(tag, tag, digits=2))
        for row in table.rows:
            row[tag] = figures[str(row["name"])].get(tag)
    if not arguments.cal_speedup:
        return
    baseline = _baseline(figures, times, arguments.baseline, reference)
    notes.append(f"speed-ups are against {baseline}")
    against = ratios(figures, baseline)
    for tag in times.tags:
        key = f"{tag}_ratio" if "flop" in tag else f"{tag}_speedup"
        table.columns.append(Column(key, ratio_heading(tag), digits=2, higher=True, unit="x"))
        for row in table.rows:
            row[key] = against[str(row["name"])].get(tag)


def _baseline(
    figures: dict[str, dict[str, float]], times: Timings, asked: str | None, reference: str | None
) -> str:
    """Choose the run that others are compared with, and see that its figures are there."""
    wanted = asked
    if wanted is None and reference is not None:
        path = Path(reference)
        wanted = path.resolve().name if path.is_dir() else path.stem
    if wanted is not None and (own := times.figures(wanted)):
        figures[wanted] = own
        return wanted
    if asked is not None:
        return asked  # refused, with the names that are known
    tag = times.tags[0]
    return max(figures, key=lambda name: figures[name].get(tag, 0.0))
