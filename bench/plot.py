"""A bar chart of how near each op comes to the memory's own speed, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")
INK, GRID = "#202020", "#dddddd"
BAR, GAP, HEIGHT, LEFT, TOP, BOTTOM = 14, 26, 320, 60, 95, 60


class Measured(Protocol):
    """What is drawn of a line of the table."""

    @property
    def op(self) -> str:
        """Group of bars."""

    @property
    def shape(self) -> str:
        """Colour of the bar."""

    @property
    def of_floor(self) -> float | None:
        """Its height, in percent."""


def draw_floors(rows: Sequence[Measured], title: str, path: Path) -> None:
    """Write a PNG: a group of bars per op, a bar per shape, 100 % where the floor is reached."""
    ops = list(dict.fromkeys(row.op for row in rows))
    shapes = list(dict.fromkeys(row.shape for row in rows))
    font = ImageFont.load_default(12)
    group = max(BAR * max(1, len(shapes)) + GAP, 860 // max(1, len(ops)))
    width = max(LEFT + group * len(ops) + GAP, 940)
    image = Image.new("RGB", (width, TOP + HEIGHT + BOTTOM), "white")
    draw = ImageDraw.Draw(image)
    highest = max([100.0, *(row.of_floor or 0.0 for row in rows)])
    top = 20 * -(-highest // 20)

    def y_of(percent: float) -> float:
        return TOP + HEIGHT * (1 - percent / top)

    for percent in range(0, int(top) + 1, 20):
        reached = percent == 100
        draw.line((LEFT, y_of(percent), width - GAP, y_of(percent)), INK if reached else GRID)
        draw.text((LEFT - 8, y_of(percent)), f"{percent} %", INK, font, anchor="rm")
    for row in rows:
        x = LEFT + GAP // 2 + group * ops.index(row.op) + BAR * shapes.index(row.shape)
        colour = COLOURS[shapes.index(row.shape) % len(COLOURS)]
        draw.rectangle((x, y_of(row.of_floor or 0.0), x + BAR - 3, y_of(0)), colour)
    for i, op in enumerate(ops):
        middle = LEFT + GAP // 2 + group * i + (group - GAP) / 2
        # every other name is lower: narrow groups have wide names
        draw.text((middle, TOP + HEIGHT + 10 + 15 * (i % 2)), op, INK, font, anchor="ma")
    x = LEFT
    for i, shape in enumerate(shapes):
        draw.rectangle((x, TOP - 16, x + 10, TOP - 6), COLOURS[i % len(COLOURS)])
        draw.text((x + 15, TOP - 11), shape, INK, font, anchor="lm")
        x += 35 + int(font.getlength(shape))
    for i, text in enumerate(title.splitlines()):
        draw.text((LEFT, 4 + 14 * i), text.removeprefix("# "), INK, font)
    image.save(path)
