"""A chart of speed-up to the right and PSNR up, as SVG."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, BELOW, ABOVE = 860, 480, 60, 20, 50, 40
COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999", "#222222",
    "#ee7733",
)  # fmt: skip


class Chart:
    """The grid, to which marks are added.

    Args:
        speeds: all that are marked; 1 is in the chart, too.
        qualities: all that are marked, in dB.
        below: what is written under the chart.
        title: what is written over it.
        beside: pixels to the right, for names.
    """

    def __init__(
        self,
        speeds: Sequence[float],
        qualities: Sequence[float],
        below: str,
        title: str = "",
        beside: int = RIGHT,
    ) -> None:
        self._slowest = math.floor(2 * min([1, *speeds])) / 2  # below 1: slower than without
        self._fastest = math.ceil(2 * max([1, *speeds]) + 0.5) / 2
        self._low = 5 * math.floor(min(qualities, default=20) / 5) - 5
        self._high = 5 * math.ceil(max(qualities, default=60) / 5) + 5
        self.right, self.bottom = WIDTH - beside, HEIGHT - BELOW
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        ]
        for quality in range(self._low, self._high + 1, 5):
            y = self.at(1, quality)[1]
            self.add(f'<path d="M{LEFT} {y:.1f}H{self.right}" stroke="#dddddd"/>')
            self.text(LEFT - 8, y + 4, str(quality), ' text-anchor="end"')
        for half in range(round(2 * self._slowest), round(2 * self._fastest) + 1):
            x = self.at(half / 2, self._high)[0]
            self.add(f'<path d="M{x:.1f} {ABOVE}V{self.bottom}" stroke="#eeeeee"/>')
            self.text(x, self.bottom + 18, f"{half / 2:g}x", ' text-anchor="middle"')
        self.text(LEFT, 14, title)
        self.text(LEFT, 30, "PSNR in dB")
        self.text(self.right, HEIGHT - 10, below, ' text-anchor="end"')

    def at(self, speed: float, quality: float) -> tuple[float, float]:
        """Return where a mark lies, from the left and from above."""
        across = (speed - self._slowest) / (self._fastest - self._slowest)
        down = (self._high - quality) / (self._high - self._low)
        return LEFT + (self.right - LEFT) * across, ABOVE + (self.bottom - ABOVE) * down

    def add(self, element: str) -> None:
        """Add an element of SVG."""
        self._parts.append(element)

    def text(self, x: float, y: float, words: str, attributes: str = "") -> None:
        """Write words."""
        if words:
            self.add(f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{html.escape(words)}</text>')

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        Path(path).write_text("\n".join([*self._parts, "</svg>"]) + "\n", encoding="utf-8")
