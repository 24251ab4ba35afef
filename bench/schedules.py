"""A schedule of the trained model, for the table of methods.

python -m bench.run schedules    # 15 minutes at most; bench/calibrations/digits_schedule.json

Calibrated on seeds from 100 on, checked on seeds from 200 on; `bench.methods` draws seeds 0 to 9.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dbcache
from dbcache.demo import digits

STEPS = 50
FULL_STEPS = {"1.5x": 33, "2x": 25, "3x": 16, "4x": 12}
"""By level of `bench.methods`."""

CALIBRATED, VALIDATED = 100, 200
PATH = Path(__file__).resolve().parent / "calibrations" / "digits_schedule.json"


def drawing(seed: int, images: int, steps: int = STEPS) -> Callable[[Any], torch.Tensor]:
    """Return a function that draws some digits, from 0 or from 5 on."""

    def draw(pipe: Any) -> torch.Tensor:
        arguments = digits.prompt([(5 * seed + i) % digits.NUM_CLASSES for i in range(images)])
        generator = torch.Generator("cpu").manual_seed(seed)
        call = {"num_inference_steps": steps, "generator": generator}
        return digits.decode(pipe(**arguments, **call).images)

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.schedules", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--pictures", type=int, default=6, help="to calibrate on, of 5 digits each")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    dbcache.tune(
        pipe,
        [drawing(CALIBRATED + i, 5) for i in range(args.pictures)],
        validation=[drawing(VALIDATED + i, 5) for i in range(2)],
        full_steps=list(FULL_STEPS.values()),
        budget_minutes=args.minutes,
        path=args.out,
    )


if __name__ == "__main__":
    main()
