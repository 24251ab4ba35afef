"""Weights of the transformer in 8 bits, with the cache on.

    pip install 'dbcache-dit[quantization]'
    python docs/examples/quantize.py Qwen/Qwen-Image --prompt "a cat" --type float8_weight_only

The types are those of `dbcache.quantize`.
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
    parser.add_argument("--type", default="int8_weight_only")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)

    pipe = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16)
    pipe.to(arguments.device)
    pipe.transformer = dbcache.quantize(pipe.transformer, quant_type=arguments.type)
    dbcache.enable(pipe, DBCacheConfig(Fn_compute_blocks=1))
    pipe(prompt=arguments.prompt, num_inference_steps=arguments.steps, **more)
    return dbcache.summary(pipe)


if __name__ == "__main__":
    main()
