"""What narrow weights cost and save, with and without a cache: the trained model.

python -m bench.quantize                              # the table of docs/quantize.md
python -m bench.quantize --digits 1 --steps 8         # a quick look

Each type is drawn plain and with the cache, by turns with the float model, which all pictures are
compared with. Bytes are those of the weights as they are stored; of the linear layers within the
blocks, which are quantised, and of all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import dbcache
from dbcache.demo import digits
from dbcache.demo.quality import DigitClassifier, psnr
from dbcache.quantization import stored_bytes

ANYWHERE = ("float8_weight_only", "int8_weight_only", "int8_per_row")
"""Types that run on a CPU."""

CACHE = {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.2}


def draw(pipe: Any, per_digit: int, steps: int) -> tuple[torch.Tensor, float]:
    """Return pictures (B, 16, 16) of all digits, and the CPU seconds that they took."""
    prompts = list(range(digits.NUM_CLASSES)) * per_digit
    start = time.process_time()
    tokens = pipe(
        **digits.prompt(prompts),
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images
    return digits.decode(tokens), time.process_time() - start


def measure(types: tuple[str, ...], per_digit: int, steps: int, repeats: int) -> list[dict]:
    """Return a record per type, and whether the cache is on."""
    plain = digits.load_pipeline()
    plain.set_progress_bar_config(disable=True)
    labels = torch.tensor(list(range(digits.NUM_CLASSES)) * per_digit)
    classifier, records = DigitClassifier(), []
    reference, _ = draw(plain, per_digit, steps)
    whole = stored_bytes(plain.transformer)
    for kind in ("float32", *types):
        pipe = digits.load_pipeline()
        pipe.set_progress_bar_config(disable=True)
        if kind != "float32":
            dbcache.quantize(pipe, quant_type=kind)
        for cached in (False, True):
            if cached:
                dbcache.enable(pipe, **CACHE)
            images, _ = draw(pipe, per_digit, steps)  # warms up
            times = [
                (draw(plain, per_digit, steps)[1], draw(pipe, per_digit, steps)[1])
                for _ in range(repeats)
            ]
            lanes = dbcache.summary(pipe, logging=False).lanes if cached else []
            records.append(
                {
                    "type": kind,
                    "cached": len(lanes[0].cached_steps) if lanes else 0,
                    "psnr": psnr(images, reference),
                    "accuracy": classifier.accuracy(images, labels),
                    "share": stored_bytes(pipe.transformer) / whole,
                    "speedup": statistics.median(full / own for full, own in times),
                }
            )
    return records


def markdown(records: list[dict], steps: int) -> str:
    """Return a table: a line per type, without and with the cache."""
    lines = [
        "| weights | bytes of the model | steps cached | PSNR dB | accuracy | CPU time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in records:
        lines.append(
            f"| {row['type']} | {100 * row['share']:.0f} % | {row['cached']} of {steps} | "
            f"{row['psnr']:.1f} | {100 * row['accuracy']:.0f} % | {row['speedup']:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.quantize", description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=[*ANYWHERE])
    parser.add_argument("--digits", type=int, default=5, help="pictures of each digit")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    records = measure(tuple(given.types), given.digits, given.steps, given.repeats)
    print(markdown(records, given.steps))


if __name__ == "__main__":
    main()
