"""Other steps and settings from image to image, on a transformer that is enabled by itself.

    python docs/examples/refresh.py Qwen/Qwen-Image --prompt "a cat"

`refresh_context` starts the next image, changes what it is given, and leaves the rest as it was.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import dbcache
from dbcache import DBCacheConfig


def main(argv=None, **more):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt")
    parser.add_argument("--steps", type=int, nargs=2, default=(28, 50))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)

    pipe = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16)
    pipe.to(arguments.device)
    call = {"prompt": arguments.prompt, **more}
    few, many = arguments.steps
    dbcache.enable(pipe.transformer, DBCacheConfig(Fn_compute_blocks=1))
    changes = (
        {"num_inference_steps": few},
        {"num_inference_steps": many},
        {
            "num_inference_steps": many,
            "cache_config": DBCacheConfig(
                residual_diff_threshold=0.1,
                max_warmup_steps=10,
                max_cached_steps=20,
                max_continuous_cached_steps=4,
            ),
        },
    )
    found = []
    for change in changes:
        dbcache.refresh_context(pipe.transformer, **change, verbose=True)
        pipe(**call, num_inference_steps=change["num_inference_steps"])
        found.append(dbcache.summary(pipe.transformer))
    return found


if __name__ == "__main__":
    main()
