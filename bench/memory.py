"""Bytes that a lane keeps, by model and resolution: the table of docs/memory.md.

    python -m bench.memory

From the shapes of real models (`bench/shapes.py`) and what a lane keeps: P_ref, and K stored
residuals of both streams; K is 1 for reuse, 2 for TaylorSeer of order 1, 3 for FoCa.
"""

from __future__ import annotations

from bench.shapes import SHAPES, Shape

SLOTS = {"reuse": 1, "TaylorSeer 1": 2, "FoCa": 3}
MB = 1e6


def lane_bytes(shape: Shape, slots: int, *, fp8: bool = False) -> float:
    """Return the bytes of a lane with `slots` stored residuals.

    Args:
        shape: of the streams; both have its dtype, and P_ref has it too.
        slots: stored residuals.
        fp8: they are stored as e4m3 with a float32 scale per token (`cache_dtype="fp8"`).
    """
    streams = shape.hidden_bytes + shape.encoder_bytes
    tokens = shape.batch * (shape.hidden + shape.encoder)
    per_slot = tokens * (shape.width + 4) if fp8 else streams
    return shape.hidden_bytes + slots * per_slot


def table() -> str:
    """Return a line per model: megabytes of one lane, by predictor."""
    names = [*SLOTS, *(f"{name}, fp8" for name in SLOTS if name != "reuse")]
    lines = [f"| one lane, MB | tokens | {' | '.join(names)} |"]
    lines.append("| --- " * (len(names) + 2) + "|")
    for shape in SHAPES.values():
        cells = [lane_bytes(shape, slots) for slots in SLOTS.values()]
        cells += [lane_bytes(shape, n, fp8=True) for name, n in SLOTS.items() if name != "reuse"]
        tokens = f"{shape.hidden} + {shape.encoder}"
        values = " | ".join(f"{cell / MB:.0f}" for cell in cells)
        lines.append(f"| {shape.name} | {tokens} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
