"""Results of a sweep as a table, and as a plot of speed-up against PSNR."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from pathlib import Path

from dbcache.tuning.sweep import Result

WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 860, 480, 60, 50, 24
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")


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
    qualities = [each.psnr for each in results]
    left = math.floor(2 * min([1, *speeds])) / 2  # below 1: slower than without the cache
    right = math.ceil(2 * max([1, *speeds]) + 0.5) / 2
    low = 5 * math.floor(min(qualities, default=20) / 5) - 5
    high = 5 * math.ceil(max(qualities, default=60) / 5) + 5

    def x_of(speed: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * (speed - left) / (right - left)

    def y_of(quality: float) -> float:
        return ABOVE + (HEIGHT - ABOVE - BELOW) * (high - quality) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for quality in range(low, high + 1, 5):
        y = y_of(quality)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{quality}</text>')
    speed = left
    while speed <= right:
        x, bottom = x_of(speed), HEIGHT - BELOW
        parts.append(f'<path d="M{x:.1f} {ABOVE}V{bottom}" stroke="#eeeeee"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{speed:g}x</text>')
        speed += 0.5
    for index, each in enumerate(results):
        colour = COLOURS[index % len(COLOURS)]
        x, y, limit = x_of(each.speedup), y_of(each.psnr), x_of(each.bound)
        parts.append(
            f'<path d="M{x:.1f} {y:.1f}H{limit:.1f}" stroke="{colour}" stroke-dasharray="2 3"/>'
            f'<path d="M{limit:.1f} {y - 5:.1f}v10" stroke="{colour}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
            f'<text x="{x + 7:.1f}" y="{y - 6:.1f}" fill="{colour}">{html.escape(each.name)}</text>'
        )
    parts.append(f'<text x="{LEFT}" y="14">PSNR in dB</text>')
    parts.append(
        f'<text x="{WIDTH - 20}" y="{HEIGHT - 10}" text-anchor="end">speed-up of the call, tick: '
        f"the bound</text></svg>"
    )
    Path(path).write_text("\n".join(parts) + "\n", encoding="utf-8")
