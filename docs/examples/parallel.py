"""Generate with a real pipeline whose transformer is spread over GPUs, with and without the cache.

One node:

    torchrun --nproc-per-node 4 docs/examples/parallel.py flux --ulysses 4
    torchrun --nproc-per-node 4 docs/examples/parallel.py wan --ulysses 2 --cfg 2 --float8
    torchrun --nproc-per-node 8 docs/examples/parallel.py hunyuanvideo --ulysses 4 --tp 2

Two nodes, the same line on both (HOST is the first node's name):

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        docs/examples/parallel.py hunyuanvideo --ulysses 8 --ring 2

Rank 0 prints seconds, the cached steps, peak memory and the PSNR of the cached latents.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import diffusers
import torch
import torch.distributed as dist

import dbcache


@dataclass(frozen=True)
class Model:
    """A pipeline by name: where its weights are and what it is called with."""

    pipeline: str
    weights: str
    inputs: dict[str, Any] = field(default_factory=dict)


PROMPT = "A cat holding a sign that says hello world"
MODELS = {
    "flux": Model("FluxPipeline", "black-forest-labs/FLUX.1-dev"),
    "chroma": Model("ChromaPipeline", "lodestones/Chroma1-HD"),
    "qwen": Model("QwenImagePipeline", "Qwen/Qwen-Image", {"true_cfg_scale": 4.0}),
    "wan": Model("WanPipeline", "Wan-AI/Wan2.1-T2V-14B-Diffusers", {"num_frames": 81}),
    "wan2.2": Model("WanPipeline", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", {"num_frames": 81}),
    "hunyuanvideo": Model(
        "HunyuanVideoPipeline", "hunyuanvideo-community/HunyuanVideo", {"num_frames": 61}
    ),
    "hunyuanimage": Model(
        "HunyuanImagePipeline", "hunyuanvideo-community/HunyuanImage-2.1-Diffusers"
    ),
    "cogvideox": Model("CogVideoXPipeline", "zai-org/CogVideoX-5b", {"num_frames": 49}),
    "cogview4": Model("CogView4Pipeline", "zai-org/CogView4-6B"),
    "ltx": Model("LTXPipeline", "Lightricks/LTX-Video", {"num_frames": 97}),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    for axis in ("ulysses", "ring", "tp", "cfg", "dp"):
        parser.add_argument(f"--{axis}", type=int, default=1, help="ranks along this axis")
    parser.add_argument("--anything", action="store_true", help="uneven heads and lengths")
    parser.add_argument("--float8", action="store_true", help="messages of Ulysses in fp8")
    parser.add_argument("--async", dest="overlap", action="store_true", help="hide exchanges")
    parser.add_argument("--gather", action="store_true", help="ring by all-gather")
    parser.add_argument("--extra", nargs="+", help="text_encoder, vae: spread them, too")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--threshold", type=float, default=0.12)
    return parser.parse_args(arguments)


def parallelism(options: argparse.Namespace) -> dbcache.ParallelismConfig:
    """Return how the ranks share the transformer."""
    kwargs: dict[str, Any] = {
        name: True
        for name, is_on in (
            ("experimental_ulysses_anything", options.anything),
            ("experimental_ulysses_async", options.overlap),
            ("experimental_ulysses_float8", options.float8),
        )
        if is_on
    }
    if options.gather:
        kwargs["ring_rotate_method"] = "allgather"
    if options.extra:
        kwargs["extra_parallel_modules"] = options.extra
    return dbcache.ParallelismConfig(
        ulysses_size=options.ulysses,
        ring_size=options.ring,
        tp_size=options.tp,
        cfg_size=options.cfg,
        dp_size=options.dp,
        parallel_kwargs=kwargs,
    )


def compare(pipe: Any, inputs: dict[str, Any], options: argparse.Namespace) -> dict[str, str]:
    """Generate once in full and once with the cache, on all ranks; return what to print."""
    config = parallelism(options)
    results, seconds = [], []
    for threshold in (0.0, options.threshold):
        dbcache.enable(
            pipe,
            Fn_compute_blocks=1,
            max_warmup_steps=4,
            residual_diff_threshold=threshold,
            parallelism_config=config,
        )
        pipe(**inputs, num_inference_steps=2, output_type="latent")  # compiles and warms up
        dist.barrier()
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        output = pipe(
            **inputs,
            num_inference_steps=options.steps,
            generator=generator,
            output_type="latent",
        )
        results.append(output[0].float().cpu())  # waits for the device
        seconds.append(time.perf_counter() - start)
    report = str(dbcache.summary(pipe, logging=False))
    dbcache.disable(pipe)
    full, cached = results
    error = (full - cached).square().mean()
    peak = full.max() - full.min()
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "parallelism": config.strify(),
        "full": f"{seconds[0]:.2f} s",
        "cached": f"{seconds[1]:.2f} s ({seconds[0] / seconds[1]:.2f}x)",
        "PSNR of the latents": f"{10 * torch.log10(peak**2 / error):.1f} dB",
        "peak memory of rank 0": f"{memory:.1f} GiB",
        "cache": report,
    }


def main() -> None:
    options = parse()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=10))
    try:
        model = MODELS[options.model]
        kind = getattr(diffusers, model.pipeline)
        pipe = kind.from_pretrained(model.weights, torch_dtype=torch.bfloat16).to(device)
        pipe.set_progress_bar_config(disable=dist.get_rank() != 0)
        report = compare(pipe, {"prompt": PROMPT, **model.inputs}, options)
        if dist.get_rank() == 0:
            for name, value in report.items():
                print(f"{name}: {value}")
        dist.barrier()  # a rank that leaves early closes connections that others still use
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
