"""The demo's picture: one row per setting, and below it the difference to the first row."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

CELL = 64
GAP = 4
LABEL = 14
DIFFERENCE_GAIN = 20


def draw_grid(path: Path, rows: list[tuple[str, torch.Tensor]], columns: int) -> None:
    """Write a PNG.

    Args:
        path: the file.
        rows: (name, images (B, H, W) in [0, 1]) per setting; the first is the reference.
        columns: how many images of each row are shown.
    """
    reference = rows[0][1]
    strips = rows[:1]
    for name, images in rows[1:]:
        difference = ((images - reference).abs() * DIFFERENCE_GAIN).clamp(0, 1)
        strips += [(name, images), (f"difference x{DIFFERENCE_GAIN}", difference)]
    height = len(strips) * (CELL + LABEL + GAP) + GAP
    sheet = Image.new("L", (columns * (CELL + GAP) + GAP, height), 255)
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(strips):
        top = GAP + row * (CELL + LABEL + GAP)
        pen.text((GAP, top), name, fill=0)
        for column, image in enumerate(images[:columns]):
            pixels = (image * 255).round().to(torch.uint8).numpy()
            cell = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(cell, (GAP + column * (CELL + GAP), top + LABEL))
    sheet.save(path)
