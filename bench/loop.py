"""A denoising loop as one CUDA graph per image, with the cache's decisions inside.

    python -m bench.loop [--device cuda] [--steps 28] [--images 5] [--size 512] [--json FILE]

Transformer and scheduler of all steps are captured once; an image is then one launch. Which steps
are skipped is decided on the GPU while the graph runs, so it differs from image to image; the trace
is read after the loop. `denoise` and `capture_loop` are the part to copy.

Weights are random, so the threshold is put among the changes that a first loop measures. A loop
without a cached step, or with nothing but cached ones after the warm-up, ends with status 1: its
time would tell nothing. On a CPU the loop runs eagerly alone, with a tiny model, as a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

import dbcache
from bench.overhead import header

OPTIONS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 4,
    "max_continuous_cached_steps": 4,
    "residual_diff_threshold": 0.12,
    "enable_taylorseer": True,
}
TINY = {"double": 1, "single": 1, "heads": 2}
"""Size of the model on a CPU."""


@torch.no_grad()
def denoise(
    transformer: torch.nn.Module,
    scheduler: FlowMatchEulerDiscreteScheduler,
    latents: torch.Tensor,
    inputs: dict[str, Any],
    times: list[torch.Tensor],
) -> None:
    """Denoise `latents` in place. `times` hold the scheduler's steps, on the device."""
    # told where it begins, the scheduler need not search, which would wait for the device
    scheduler.set_begin_index(0)
    scheduler._step_index = None
    dbcache.refresh_context(transformer)  # inside the capture, so that each image starts anew
    for t in times:
        velocity = transformer(hidden_states=latents, timestep=t, return_dict=False, **inputs)[0]
        latents.copy_(scheduler.step(velocity, t, latents, return_dict=False)[0])


def capture_loop(
    transformer: torch.nn.Module,
    scheduler: FlowMatchEulerDiscreteScheduler,
    latents: torch.Tensor,
    inputs: dict[str, Any],
    times: list[torch.Tensor],
) -> torch.cuda.CUDAGraph:
    """Return the loop as a graph that denoises what `latents` hold when it is replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and tunes what needs it, makes the lanes' buffers
        denoise(transformer, scheduler, latents.clone(), inputs, times)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        denoise(transformer, scheduler, latents, inputs, times)
    return graph


def build(
    device: str,
    double: int = 19,
    single: int = 38,
    heads: int = 24,
    dtype: torch.dtype = torch.bfloat16,
) -> FluxTransformer2DModel:
    """Return a transformer of FLUX.1's kind and by default its size, with random weights."""
    with torch.device(device):
        model = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, num_attention_heads=heads
        )
    return model.to(dtype).eval()


def inputs_of(size: int, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return what FLUX.1 takes beside latents and time, for an image of `size` squared pixels."""
    side = size // 16
    ids = torch.zeros(side, side, 3, device=device, dtype=dtype)
    ids[..., 1] = torch.arange(side, device=device)[:, None]
    ids[..., 2] = torch.arange(side, device=device)
    return {
        "encoder_hidden_states": torch.randn(1, 512, 4096, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, 768, device=device, dtype=dtype),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(512, 3, device=device, dtype=dtype),
    }


class Loop:
    """A loop over one image, from the same noise each time.

    Args:
        model: a transformer of FLUX's kind.
        steps: of the loop.
        size: of the image, in pixels.
    """

    def __init__(self, model: FluxTransformer2DModel, steps: int, size: int) -> None:
        self.model, self.steps = model, steps
        device = next(model.parameters()).device
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(steps, device=device)
        self.times = [(t / 1000).expand(1).to(torch.bfloat16) for t in self.scheduler.timesteps]
        self.inputs = inputs_of(size, str(device))
        tokens = (size // 16) ** 2
        self.start = torch.randn(1, tokens, 64, device=device, dtype=torch.bfloat16)
        self.latents = self.start.clone()
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def enable(self) -> float:
        """Enable the cache and return its threshold, which lies among the changes of this loop."""
        # so small that each step is measured and none is cached
        measuring = OPTIONS | {"residual_diff_threshold": 1e-6}
        dbcache.enable(self.model, num_inference_steps=self.steps, **measuring)
        self.eager()
        threshold = dbcache.summary(self.model, logging=False).lanes[0].percentiles["P75"]
        chosen = OPTIONS | {"residual_diff_threshold": threshold}
        dbcache.enable(self.model, num_inference_steps=self.steps, **chosen)
        return threshold

    def eager(self) -> None:
        """Denoise what `latents` hold."""
        denoise(self.model, self.scheduler, self.latents, self.inputs, self.times)

    def capture(self) -> torch.cuda.CUDAGraph:
        """Return `eager` as a graph."""
        return capture_loop(self.model, self.scheduler, self.latents, self.inputs, self.times)

    def seconds(self, run: Callable[[], None], images: int) -> float:
        """Return the median time of an image."""
        seconds = []
        for _ in range(images):
            self.latents.copy_(self.start)
            self.wait()
            begin = time.perf_counter()
            run()
            self.wait()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    def check_window(self) -> list[int]:
        """Return the cached steps of the last image.

        Raises:
            SystemExit: nothing was cached, or all that could be.
        """
        lane = dbcache.summary(self.model, logging=False).lanes[0]
        cached, most = lane.cached_steps, self.steps - OPTIONS["max_warmup_steps"]
        if not 0 < len(cached) < most:
            raise SystemExit(
                f"bench.loop: some of the {most} steps after the warm-up must be cached, not none "
                f"and not all, got {len(cached)}; threshold {lane.threshold:g}, changes "
                f"{lane.percentiles}"
            )
        return cached


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--blocks", type=int, nargs=2, default=(19, 38))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.loop: needs an NVIDIA GPU, there is none; --device cpu rehearses")
    if arguments.steps < 2 + OPTIONS["max_warmup_steps"]:
        raise SystemExit(
            f"bench.loop: --steps must be at least {2 + OPTIONS['max_warmup_steps']}, so that some "
            f"come after the warm-up, got {arguments.steps}"
        )
    torch.manual_seed(0)
    if device == "cpu":
        print("bench.loop: a rehearsal on the CPU with a tiny model, without graphs")
        model = build(device, **TINY)
    else:
        model = build(device, *arguments.blocks)
    loop = Loop(model, arguments.steps, arguments.size)
    threshold = loop.enable()
    loop.seconds(loop.eager, arguments.images)
    results = {"eager": loop.seconds(loop.eager, arguments.images)}
    cached, equal = loop.check_window(), True

    def save() -> None:
        if arguments.json:
            content = {"seconds": results, "cached": cached, "threshold": threshold}
            content |= {"header": header(device), "equal": equal}
            arguments.json.write_text(json.dumps(content), encoding="utf-8")

    save()  # a capture may fail
    if device == "cuda":
        expected = loop.latents.clone()
        graph = loop.capture()
        results["one graph per image"] = loop.seconds(graph.replay, arguments.images)
        equal = torch.equal(loop.latents, expected) and loop.check_window() == cached
        save()
    print(f"{header(device)} | {arguments.size} pixels")
    print(f"{len(cached)} of {arguments.steps} steps cached at a threshold of {threshold:.3f}")
    for name, seconds in results.items():
        print(f"{name:<22}{seconds * 1e3:10.1f} ms per image")
    if not equal:
        raise SystemExit("bench.loop: the graph's latents or decisions differ from the eager ones")


if __name__ == "__main__":
    main()
