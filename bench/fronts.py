"""A picture of methods: speed-up to the right, PSNR up, a line per method, as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999", "#222222",
    "#ee7733",
)  # fmt: skip
OWN = "dbcache"
"""Has full lines, its peer dashed ones."""

WIDTH, HEIGHT, LEFT, RIGHT, ABOVE, BELOW = 860, 420, 46, 210, 44, 44


def draw_fronts(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write the picture of `rows`, as `bench.methods.table` returns them; time is CPU time."""
    fronts: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["cpu_speedup"]):
        key = row["method"], row["engine"]
        fronts.setdefault(key, []).append((row["cpu_speedup"], row["psnr"]))
    speeds, qualities = (
        [point[axis] for line in fronts.values() for point in line] for axis in (0, 1)
    )
    right = math.ceil(2 * max(speeds) + 0.2) / 2
    low, high = (5 * f(g(qualities) / 5) for f, g in ((math.floor, min), (math.ceil, max)))
    step = 0.5 if right <= 6 else 1.0

    def x_of(speed: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (speed - 1) / (right - 1)

    def y_of(quality: float) -> float:
        return ABOVE + (HEIGHT - ABOVE - BELOW) * (high - quality) / (high - low)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{html.escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 16, title),
        text(LEFT, 32, "PSNR in dB"),
        text(WIDTH - RIGHT, HEIGHT - 8, "speed-up in CPU time", ' text-anchor="end"'),
    ]
    for quality in range(low, high + 1, 5):
        y = y_of(quality)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(text(LEFT - 8, y + 4, str(quality), ' text-anchor="end"'))
    for count in range(int((right - 1) / step) + 1):
        x = x_of(1 + count * step)
        parts.append(f'<path d="M{x:.1f} {ABOVE}V{HEIGHT - BELOW}" stroke="#eeeeee"/>')
        label = f"{1 + count * step:g}x"
        parts.append(text(x, HEIGHT - BELOW + 16, label, ' text-anchor="middle"'))
    methods = list(dict.fromkeys(method for method, _ in fronts))
    order = sorted(fronts, key=lambda key: -sum(y for _, y in fronts[key]) / len(fronts[key]))
    for place, key in enumerate(order):
        colour = COLOURS[methods.index(key[0]) % len(COLOURS)]
        is_own = key[1] == OWN
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{"" if is_own else "6 3"}"'
        points = [(x_of(x), y_of(y)) for x, y in fronts[key]]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{line}" fill="none" {stroke}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = ABOVE + 6 + 17 * place
        parts.append(f'<path d="M{WIDTH - RIGHT + 14} {y}h22" {stroke}/>')
        parts.append(text(WIDTH - RIGHT + 42, y + 4, key[0] if is_own else f"{key[0]} of {key[1]}"))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
