"""Timelines of lanes as SVG: a column per step, filled where it was cached, the change on top."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dbcache.results.lane import CACHED, LaneSummary

WIDTH, HEIGHT, LEFT, RIGHT, TOP, STRIP = 900, 120, 56, 12, 26, 18
PANEL = TOP + HEIGHT + STRIP + 28
"""Height of one lane, in pixels."""

COLOURS = {
    "warm-up": "#8a8f98",
    "mask": "#6b7a99",
    "above threshold": "#c0504d",
    "below threshold": "#2e8b57",
    "threshold is 1 or more": "#66b28a",
    "static": "#9bc9b1",
    "NaN diff": "#7b1fa2",
}
OTHER = "#d89c3a"
"""Limits, and steps without a reference."""

INK, GRID, LINE = "#30343b", "#dde1e6", "#d2691e"


@dataclass(frozen=True)
class Plot:
    """A drawing; notebooks show it.

    Attributes:
        svg: the picture, an SVG document.
    """

    svg: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture as an SVG file.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(self.svg, encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        return self.svg


def timelines(lanes: Sequence[LaneSummary]) -> str:
    """Return an SVG with a panel per lane."""
    height = PANEL * max(len(lanes), 1)
    panels = [
        f'<g transform="translate(0,{PANEL * i})">{panel(lane)}</g>' for i, lane in enumerate(lanes)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="11" '
        f'fill="{INK}" role="img">{"".join(panels)}</svg>'
    )


def panel(lane: LaneSummary) -> str:
    """Return one lane: the changes over the threshold, and a strip of full and cached steps."""
    wide = (WIDTH - LEFT - RIGHT) / max(lane.steps, 1)
    finite = [diff for diff in lane.diffs.values() if math.isfinite(diff)]
    top = 1.15 * max([*finite, 1e-9, *([lane.threshold] if lane.threshold < 1 else [])])
    title = f"{lane.name}: {len(lane.cached_steps)} of {lane.steps} steps cached"
    parts = [f'<text x="{LEFT}" y="14" font-weight="bold">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = TOP + HEIGHT * (1 - share)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * top:.3g}</text>'
        )
    parts += [_step(lane, step, wide, top) for step in range(lane.steps)]
    if lane.threshold < top:
        y = TOP + HEIGHT * (1 - lane.threshold / top)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{LINE}" '
            f'stroke-dasharray="5 3"/><text x="{WIDTH - RIGHT}" y="{y - 4:.1f}" fill="{LINE}" '
            f'text-anchor="end" stroke="#fff" stroke-width="3" paint-order="stroke">'
            f"threshold {lane.threshold:g}</text>"
        )
    return "".join(parts)


def _step(lane: LaneSummary, step: int, wide: float, top: float) -> str:
    """Return the column of one step, with a text that a browser shows under the pointer."""
    reason, x = lane.reasons[step], LEFT + step * wide
    colour = COLOURS.get(reason, OTHER)
    diff, is_cached = lane.diffs.get(step), reason in CACHED
    tip = f"step {step}: {'cached' if is_cached else 'full'}, {reason}"
    if diff is not None:
        tip += f", change {diff:.4g}, threshold {lane.threshold:g}"
    if step < len(lane.seconds) and math.isfinite(lane.seconds[step]):
        tip += f", {1e3 * lane.seconds[step]:.3g} ms"
    parts = [f"<title>{escape(tip)}</title>"]
    if diff is not None and math.isfinite(diff):
        high = HEIGHT * min(diff / top, 1)
        parts.append(
            f'<rect x="{x + 0.1 * wide:.2f}" y="{TOP + HEIGHT - high:.2f}" '
            f'width="{0.8 * wide:.2f}" height="{high:.2f}" fill="{colour}" opacity="0.75"/>'
        )
    fill, y = ("none" if is_cached else colour), TOP + HEIGHT + 4
    at = f'x="{x + 0.5:.2f}" width="{max(wide - 1, 0.5):.2f}"'
    parts.append(
        f'<rect class="{"cached" if is_cached else "full"}" {at} y="{y}" height="{STRIP}" '
        f'fill="{fill}" stroke="{colour}"/>'
    )
    if is_cached and lane.pruned is not None and lane.blocks:
        ran = STRIP * (1 - len(lane.pruned[step]) / lane.blocks)
        where = f'y="{y + STRIP - ran:.2f}" height="{ran:.2f}"'
        parts.append(f'<rect class="ran" {at} {where} fill="{colour}"/>')
    every = max(1, round(lane.steps / 15))
    if step % every == 0:
        parts.append(
            f'<text x="{x + wide / 2:.2f}" y="{y + STRIP + 12}" text-anchor="middle">{step}</text>'
        )
    return f"<g>{''.join(parts)}</g>"
