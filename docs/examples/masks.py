"""Masks of steps: which are full, and whether the others ask the change or are cached anyway.

    python docs/examples/masks.py black-forest-labs/FLUX.1-dev --prompt "a cat" --steps 28

prints the settings of each run, and saves an image under that name.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import dbcache
from dbcache import DBCacheConfig, TaylorSeerCalibratorConfig


def main(argv=None, **more):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)

    pipe = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16)
    pipe.to(arguments.device)
    names = {}
    for mask in ("slow", "medium", "fast", "ultra"):
        for policy in ("dynamic", "static"):
            dbcache.enable(
                pipe,
                DBCacheConfig(
                    Fn_compute_blocks=1,
                    residual_diff_threshold=0.12,
                    steps_computation_mask=mask,
                    steps_computation_policy=policy,
                ),
                TaylorSeerCalibratorConfig(taylorseer_order=1),
            )
            generator = torch.Generator("cpu").manual_seed(0)
            image = pipe(
                prompt=arguments.prompt,
                num_inference_steps=arguments.steps,
                generator=generator,
                **more,
            ).images[0]
            name = dbcache.strify(pipe)
            names[name] = dbcache.summary(pipe, logging=False)
            print(name)
            if hasattr(image, "save"):
                image.save(f"{name}.png")
    return names


if __name__ == "__main__":
    main()
