"""Run by a test in a process of its own: name the Triton kernels that are loaded while capturing.

A kernel is loaded, and compiled if it was not before, at its first launch in a process. In the
middle of a capture that may fail, and it hides how long a step takes.
"""

import sys

import inside
import torch
from diffusers import FluxTransformer2DModel
from triton.compiler import CompiledKernel

import dbcache

OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 3, "residual_diff_threshold": 0.12}
CASES = {
    "reuse": (dbcache.DBCacheConfig(**OPTIONS),),
    "fp8": (dbcache.DBCacheConfig(**OPTIONS, cache_dtype="fp8"), dbcache.FoCaCalibratorConfig()),
    "spectrum": (
        dbcache.DBCacheConfig(Fn_compute_blocks=1, l1_hidden_states_diff_threshold=0.05),
        dbcache.SpectrumCalibratorConfig(),
    ),
    "dmd": (dbcache.DBCacheConfig(**OPTIONS), dbcache.DMDCalibratorConfig(dmd_ridge=1e-6)),
    "blocks": (dbcache.DBPruneConfig(**OPTIONS),),
}


def build(device):
    with torch.device(device):
        model = FluxTransformer2DModel(
            in_channels=16, num_layers=3, num_single_layers=3, attention_head_dim=32,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
            axes_dims_rope=(8, 12, 12),
        )  # fmt: skip
    return model.eval()


def inputs(device, step):
    generator = torch.Generator(device).manual_seed(step)
    like = {"device": device}
    return {
        "hidden_states": torch.randn(1, 64, 16, generator=generator, **like),
        "encoder_hidden_states": torch.ones(1, 8, 32, **like),
        "pooled_projections": torch.ones(1, 16, **like),
        "timestep": torch.full((1,), 1 - step / 10, **like),
        "img_ids": torch.zeros(64, 3, **like),
        "txt_ids": torch.zeros(8, 3, **like),
        "return_dict": False,
    }


def main(mode, device="cuda"):
    """Record forwards; print how many kernels were loaded, and which of them in a capture."""
    loaded, late = [], []
    load = CompiledKernel._init_handles

    def watched(kernel):
        if kernel.module is None:
            loaded.append(kernel.name)
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                late.append(kernel.name)
        return load(kernel)

    CompiledKernel._init_handles = watched
    for case, configs in CASES.items():
        before = len(late)
        model = dbcache.enable(build(device), *configs, num_inference_steps=10, cuda_graph=mode)
        with torch.no_grad():
            for step in range(10):
                model(**inputs(device, step))
        if device == "cuda" and inside.graphs(model).replays != 9:
            sys.exit(f"{case}: 9 of 10 steps must be replayed: {dbcache.summary(model).notes}")
        print(case, *late[before:])
    print(len(loaded))


if __name__ == "__main__":
    main(*sys.argv[1:])
