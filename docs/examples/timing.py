"""Seconds beside TFLOPs and PSNR, for several settings, runs interleaved.

    python docs/examples/timing.py black-forest-labs/FLUX.1-dev --prompt "a cat" --repeats 3

TFLOPs are what PyTorch counts of matrix products, convolutions and attention in a whole call: work
that was left out, and no speed-up. Seconds are measured. PSNR is against the uncached latents.
"""

import argparse
import math
import statistics
import time

import torch
from diffusers import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

import dbcache
from dbcache import DBCacheConfig, FoCaCalibratorConfig

SETTINGS = {
    "uncached": None,
    "F8B0 W8 R0.08": (DBCacheConfig(),),
    "F1B0 W4 R0.12": (
        DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.12),
    ),
    "F1B0 W4 MC3 R0.24 + FoCa": (
        DBCacheConfig(
            Fn_compute_blocks=1,
            max_warmup_steps=4,
            max_continuous_cached_steps=3,
            residual_diff_threshold=0.24,
        ),
        FoCaCalibratorConfig(),
    ),
}


def psnr(latents, reference):
    """Return the peak signal-to-noise ratio in dB, the peak being the reference's range."""
    error = (latents - reference).square().mean().item()
    peak = (reference.max() - reference.min()).item()
    return 10 * math.log10(peak**2 / error) if error else math.inf


class Bench:
    """Runs one pipeline under all settings."""

    def __init__(self, pipe, device, call):
        self.pipe, self.device, self.call = pipe, torch.device(device), call

    def run(self, setting, steps):
        """Return the latents, the seconds, and the share of steps that were cached."""
        if setting is not None:
            dbcache.enable(self.pipe, *setting)
        generator = torch.Generator("cpu").manual_seed(0)
        call = self.call | {"num_inference_steps": steps, "generator": generator}
        self.synchronize()
        begin = time.perf_counter()
        latents = self.pipe(**call, output_type="latent", return_dict=False)[0]
        self.synchronize()
        seconds, share = time.perf_counter() - begin, 0.0
        if setting is not None:
            share = dbcache.summary(self.pipe, logging=False).cached_fraction
            dbcache.disable(self.pipe)
        return torch.as_tensor(latents).float(), seconds, share

    def tflops(self, setting, steps):
        """Return what PyTorch counts of a call, 1e12 operations."""
        with FlopCounterMode(display=False) as counter:
            self.run(setting, steps)
        return counter.get_total_flops() / 1e12

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main(argv=None, **more):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)

    pipe = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16)
    pipe.to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    bench = Bench(pipe, arguments.device, {"prompt": arguments.prompt, **more})
    seconds = {name: [] for name in SETTINGS}
    found = {}
    for turn in range(arguments.repeats + 1):
        for name, setting in SETTINGS.items():
            latents, elapsed, share = bench.run(setting, arguments.steps)
            seconds[name] += [elapsed] * bool(turn)  # the first turn warms up
            found[name] = latents, share
    reference, rows = found["uncached"][0], []
    print("| setting | cached | seconds | speed-up | TFLOPs | PSNR dB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, setting in SETTINGS.items():
        latents, share = found[name]
        median = statistics.median(seconds[name])
        speedup = statistics.median(seconds["uncached"]) / median
        tflops, quality = bench.tflops(setting, arguments.steps), psnr(latents, reference)
        rows.append((name, share, median, speedup, tflops, quality))
        print(
            f"| {name} | {share:.0%} | {median:.3f} | {speedup:.2f}x | {tflops:.4g} "
            f"| {quality:.1f} |"
        )
    return rows


if __name__ == "__main__":
    main()
