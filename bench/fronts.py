"""A picture of methods: speed-up to the right, PSNR up, a line per method, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbcache.tuning.chart import ABOVE, COLOURS, Chart

OWN = "dbcache"
"""Has full lines, its peer dashed ones."""

BESIDE = 210
"""Pixels for the names."""


def draw_fronts(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write the picture of `rows`, as `bench.methods.table` returns them; time is CPU time."""
    fronts: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["cpu_speedup"]):
        key = row["method"], row["engine"]
        fronts.setdefault(key, []).append((row["cpu_speedup"], row["psnr"]))
    points = [point for line in fronts.values() for point in line]
    speeds, qualities = ([point[axis] for point in points] for axis in (0, 1))
    chart = Chart(speeds, qualities, "speed-up in CPU time", title, BESIDE)
    methods = list(dict.fromkeys(method for method, _ in fronts))
    order = sorted(fronts, key=lambda key: -sum(y for _, y in fronts[key]) / len(fronts[key]))
    for place, key in enumerate(order):
        colour = COLOURS[methods.index(key[0]) % len(COLOURS)]
        is_own = key[1] == OWN
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{"" if is_own else "6 3"}"'
        marks = [chart.at(*point) for point in fronts[key]]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in marks)
        chart.add(f'<path d="M{line}" fill="none" {stroke}/>')
        for x, y in marks:
            chart.add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        y = ABOVE + 6 + 17 * place
        chart.add(f'<path d="M{chart.right + 14} {y}h22" {stroke}/>')
        chart.text(chart.right + 42, y + 4, key[0] if is_own else f"{key[0]} of {key[1]}")
    chart.write(path)
