"""Results of a sweep as a table, and as a plot of speed-up against PSNR."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from dbcache.tuning.chart import COLOURS, Chart
from dbcache.tuning.sweep import Result


def sweep_table(results: Sequence[Result], *, lines: bool = True) -> str:
    """Return results as Markdown: a row per setting, and below it the lines to copy.

    Args:
        results: what `sweep` returned.
        lines: whether the calls of `enable` are listed.
    """
    has_lpips = any(result.lpips is not None for result in results)
    head = ["setting", "cached", "speed-up", "range", "bound", "PSNR dB", "lowest", "SSIM"]
    head += ["LPIPS"] * has_lpips
    rows = [head, ["---"] * len(head)]
    for each in results:
        ssim = "" if math.isnan(each.ssim) else f"{each.ssim:.4f}"
        row = [
            each.name, f"{each.cached:.0%}", f"{each.speedup:.2f}x",
            f"{each.low:.2f}-{each.high:.2f}", f"{each.bound:.2f}x", f"{each.psnr:.1f}",
            f"{each.psnr_low:.1f}", ssim,
        ]  # fmt: skip
        row += ["" if each.lpips is None else f"{each.lpips:.4f}"] * has_lpips
        rows.append(row)
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text += (
        f"\n\n{results[0].draws} draws. Speed-up: wall time of the plain call over that with the "
        f"cache, interleaved, the median. bound: 1 / (1 - f + f p), f the share of cached steps, p "
        f"that of the blocks that a cached step runs."
    )
    if lines:
        text += "\n\n" + "\n".join(f"    {each.line}  # {each.name}" for each in results)
    return text


def sweep_plot(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Write an SVG: speed-up to the right, PSNR up, a point per setting and a tick at its bound."""
    speeds = [x for each in results for x in (each.speedup, each.bound)]
    chart = Chart(speeds, [each.psnr for each in results], "speed-up of the call, tick: the bound")
    for index, each in enumerate(results):
        colour = COLOURS[index % len(COLOURS)]
        (x, y), limit = chart.at(each.speedup, each.psnr), chart.at(each.bound, each.psnr)[0]
        dotted = f'stroke="{colour}" stroke-dasharray="2 3"'
        chart.add(f'<path d="M{x:.1f} {y:.1f}H{limit:.1f}" {dotted}/>')
        chart.add(f'<path d="M{limit:.1f} {y - 5:.1f}v10" stroke="{colour}"/>')
        chart.add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        chart.text(x + 7, y - 6, each.name, f' fill="{colour}"')
    chart.write(path)
