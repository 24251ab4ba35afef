"""A denoising loop as one CUDA graph per image, with the cache's decisions inside.

    python -m bench.loop [--steps 28] [--images 5] [--size 512] [--json FILE]

Transformer and scheduler of all steps are captured once; an image is then one launch. Which steps
are skipped is decided on the GPU while the graph runs, so it differs from image to image; the trace
is read after the loop. `denoise` and `capture_loop` are the part to copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
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


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--blocks", type=int, nargs=2, default=(19, 38))
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.loop: needs an NVIDIA GPU, there is none here")
    device = "cuda"
    torch.manual_seed(0)
    model = build(device, *arguments.blocks)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(arguments.steps, device=device)
    times = [(t / 1000).expand(1).to(torch.bfloat16) for t in scheduler.timesteps]
    inputs = inputs_of(arguments.size, device)
    start = torch.randn(1, (arguments.size // 16) ** 2, 64, device=device, dtype=torch.bfloat16)
    latents = start.clone()
    dbcache.enable(model, num_inference_steps=arguments.steps, **OPTIONS)

    def eager() -> None:
        denoise(model, scheduler, latents, inputs, times)

    def timed(run: Any) -> list[float]:
        seconds = []
        for _ in range(arguments.images):
            latents.copy_(start)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return seconds

    timed(eager)
    results = {"eager": statistics.median(timed(eager))}
    expected = latents.clone()
    graph = capture_loop(model, scheduler, latents, inputs, times)
    results["one graph per image"] = statistics.median(timed(graph.replay))
    lane, equal = dbcache.summary(model).lanes[0], torch.equal(latents, expected)
    print(f"{header(device)} | {arguments.size} pixels")
    print(f"{len(lane.cached_steps)} of {lane.steps} steps cached, the same latents: {equal}")
    for name, seconds in results.items():
        print(f"{name:<22}{seconds * 1e3:10.1f} ms per image")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"seconds": results, "cached": lane.cached_steps, "equal": equal}, file)
    if not equal:
        raise SystemExit("bench.loop: the graph's latents differ from the eager ones")


if __name__ == "__main__":
    main()
