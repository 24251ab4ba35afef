"""How well each policy chooses the steps to cache, on the trained digits model.

    python -m bench.policies                      # 40 images, 50 steps; some minutes on a CPU
    python -m bench.policies --predictor reuse

Each policy at several thresholds: steps cached, blocks run, and PSNR and SSIM against the uncached
pictures of the same seeds. Policies that need a calibration get it from other seeds. Reuse and
TaylorSeer of order 1 are compared at the same decisions of the rule, not at the same steps: what
is predicted moves the latents, and those move the signal.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

import dbcache
from dbcache.calibrators import CalibratorConfig, TaylorSeerCalibratorConfig
from dbcache.config import DBCacheConfig
from dbcache.demo import digits
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
PREDICTORS: dict[str, CalibratorConfig] = {
    "reuse": CalibratorConfig(),
    "taylor": TaylorSeerCalibratorConfig(taylorseer_order=1),
}
CALIBRATED = ("teacache", "magcache")
CALIBRATION_SEED = 5000


@dataclass(frozen=True)
class Row:
    """One setting: a policy, its threshold, and whether `calibrations` must be asked for it."""

    policy: str
    threshold: float

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.policy} {self.threshold:g}"

    def config(self, calibrations: dict[str, Any]) -> DBCacheConfig:
        """Return the settings of `enable`."""
        return DBCacheConfig(
            policy=self.policy,  # type: ignore[arg-type]
            residual_diff_threshold=self.threshold,
            calibration=calibrations.get(self.policy),
            **COMMON,
        )


CALIBRATIONS = Path(__file__).resolve().parent / "calibrations"
"""Made by `calibrations` at 50 steps, one file per policy."""
_AT_SPEED = {
    "easycache": (0.012, 0.02, 0.04, 0.06),
    "teacache": (0.02, 0.03, 0.06, 0.09),
    "seacache": (0.06, 0.1, 0.2, 0.3),
    "magcache": (0.035, 0.06, 0.17, 0.3),
}


def _options(policy: str, threshold: float) -> dict[str, Any]:
    options: dict[str, Any] = {"policy": policy, "residual_diff_threshold": threshold}
    if policy in CALIBRATED:
        options["calibration"] = str(CALIBRATIONS / f"digits_{policy}.json")
    return options | {"max_warmup_steps": COMMON["max_warmup_steps"]}


LEVELS = {
    policy: {
        level: _options(policy, threshold)
        for level, threshold in zip(("1.5x", "2x", "3x", "4x"), thresholds, strict=True)
    }
    for policy, thresholds in _AT_SPEED.items()
}
"""Fields of `DBCacheConfig` by policy and level of speed, for tables of methods at 50 steps. Steps
cached on ten pictures: 18 to 22, 25 to 29, 34 or 35, and 37 to 39; a cached step runs no block."""

ROWS = tuple(Row(policy, x) for policy, thresholds in THRESHOLDS.items() for x in thresholds)


def calibrations(pipe: FluxPipeline, steps: int, per_digit: int = 2) -> dict[str, Any]:
    """Return what the calibrated policies need to know, from seeds of their own."""
    found = {}
    for policy in CALIBRATED:
        with dbcache.calibrate(pipe, policy=policy) as content:
            draw(pipe, steps, per_digit, CALIBRATION_SEED)
        found[policy] = content
    return found


def draw(pipe: FluxPipeline, steps: int, per_digit: int, seed: int) -> torch.Tensor:
    """Return `per_digit` images of each digit, (B, 16, 16)."""
    prompt = digits.prompt(list(range(digits.NUM_CLASSES)) * per_digit)
    generator = torch.Generator("cpu").manual_seed(seed)
    return digits.decode(pipe(**prompt, num_inference_steps=steps, generator=generator).images)


def measure(
    pipe: FluxPipeline, steps: int, per_digit: int, seed: int, predictors: list[str]
) -> list[list[str]]:
    """Return one line per row and predictor."""
    plain = draw(pipe, steps, per_digit, seed)
    known = calibrations(pipe, steps)
    blocks = len(pipe.transformer.transformer_blocks)
    blocks += len(pipe.transformer.single_transformer_blocks)
    lines = []
    for predictor in predictors:
        for row in ROWS:
            dbcache.enable(pipe, row.config(known), PREDICTORS[predictor])
            images = draw(pipe, steps, per_digit, seed)
            (lane,) = dbcache.summary(pipe).lanes
            dbcache.disable(pipe)
            cached = len(lane.cached_steps)
            probe = COMMON["Fn_compute_blocks"] if row.policy == "dbcache" else 0
            share = (steps - cached + cached * probe / blocks) / steps
            quality = [f"{psnr(images, plain):.1f}", f"{ssim(images, plain):.4f}"]
            lines.append([row.name, predictor, f"{cached}/{steps}", f"{share:.0%}", *quality])
            print(" | ".join(lines[-1]), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--per-digit", type=int, default=4, help="images of each digit")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--predictor", choices=[*PREDICTORS, "all"], default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    pipe = digits.load_pipeline(device=arguments.device)
    pipe.set_progress_bar_config(disable=True)
    chosen = list(PREDICTORS) if arguments.predictor == "all" else [arguments.predictor]
    print("setting | predictor | cached | blocks run | PSNR dB | SSIM")
    measure(pipe, arguments.steps, arguments.per_digit, arguments.seed, chosen)


if __name__ == "__main__":
    main()
