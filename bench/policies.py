"""How well each policy chooses the steps to cache, on the trained digits model.

    python -m bench.policies                      # 40 images, 50 steps; some minutes on a CPU
    python -m bench.policies --predictor reuse
    python -m bench.policies --calibrate          # renews what bench.methods uses instead

Each policy at several thresholds: steps cached, blocks run, and PSNR and SSIM against the uncached
pictures of the same seeds. Policies that need a calibration get it from other seeds. Reuse and
TaylorSeer of order 1 are compared at the same decisions of the rule, not at the same steps: what
is predicted moves the latents, and those move the signal.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import dbcache
from bench.methods import CALIBRATED, Bench, Method, calibration_of
from dbcache.demo.quality import psnr, ssim

COMMON = {"Fn_compute_blocks": 1, "max_warmup_steps": 4}
THRESHOLDS: dict[str, tuple[float, ...]] = {
    "dbcache": (0.1, 0.2, 0.3, 0.5),
    "easycache": (0.05, 0.1, 0.15, 0.25),
    "teacache": (0.05, 0.1, 0.15, 0.25),
    "seacache": (0.1, 0.2, 0.3, 0.5),
    "magcache": (0.02, 0.05, 0.1, 0.2),
}
"""Thresholds per policy, from about a third of the steps cached upwards."""
PREDICTORS = {
    "reuse": Method("reuse"),
    "taylor": Method("taylor", ("TaylorSeerCalibratorConfig", {"taylorseer_order": 1})),
}
CALIBRATION_SEED = 5000


def calibrations(steps: int, device: str, keep: bool = False) -> dict[str, Any]:
    """Return what the calibrated policies need to know, from 20 pictures of seeds of their own.

    Args:
        keep: also write the files that `bench.methods` reads.
    """
    bench, found = Bench(steps, 2, device), {}
    for policy in CALIBRATED:
        path = calibration_of(policy) if keep else None
        with dbcache.calibrate(bench.pipe, policy=policy, path=path) as content:
            bench.draw(CALIBRATION_SEED)
        found[policy] = content
    return found


def measure(bench: Bench, known: dict[str, Any], seed: int, predictors: list[str]) -> list[list]:
    """Return one line per predictor, policy and threshold; `known` are `calibrations`."""
    plain = bench.draw(seed).images
    transformer, steps = bench.pipe.transformer, bench.steps
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    settings = [(policy, x) for policy, thresholds in THRESHOLDS.items() for x in thresholds]
    lines = []
    for predictor in predictors:
        for policy, threshold in settings:
            options = {"policy": policy, "residual_diff_threshold": threshold, **COMMON}
            options["calibration"] = known.get(policy)
            run = bench.run(PREDICTORS[predictor], options, seed)
            probe = COMMON["Fn_compute_blocks"] if policy == "dbcache" else 0
            share = (steps - run.cached + run.cached * probe / blocks) / steps
            quality = [f"{psnr(run.images, plain):.1f}", f"{ssim(run.images, plain):.4f}"]
            name, cached = f"{policy} {threshold:g}", f"{run.cached}/{steps}"
            lines.append([name, predictor, cached, f"{share:.0%}", *quality])
            print(" | ".join(lines[-1]), flush=True)
    return lines


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--per-digit", type=int, default=4, help="images of each digit")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--predictor", choices=[*PREDICTORS, "all"], default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--calibrate", action="store_true", help="only renew bench/calibrations, at --steps"
    )
    arguments = parser.parse_args()
    known = calibrations(arguments.steps, arguments.device, keep=arguments.calibrate)
    if arguments.calibrate:
        return
    bench = Bench(arguments.steps, arguments.per_digit, arguments.device)
    chosen = list(PREDICTORS) if arguments.predictor == "all" else [arguments.predictor]
    print("setting | predictor | cached | blocks run | PSNR dB | SSIM")
    measure(bench, known, arguments.seed, chosen)


if __name__ == "__main__":
    main()
