"""A transformer without its pipeline, in a denoising loop of your own.

    python docs/examples/transformer_only.py black-forest-labs/FLUX.1-dev --steps 28

The number of steps tells the cache where an image ends; there is no pipeline call to tell it.
"""

import argparse

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

import dbcache
from dbcache import BlockAdapter, DBCacheConfig, ForwardPattern


def inputs(transformer, side, seed):
    """Return noise and conditioning; put the embeddings of your own text encoder here."""
    config, generator = transformer.config, torch.Generator().manual_seed(seed)
    like = next(transformer.parameters())

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(like)

    ids = torch.zeros(side * side, 3)
    ids[:, 1], ids[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side
    conditioning = {
        "encoder_hidden_states": noise(1, 64, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "img_ids": ids.to(like),
        "txt_ids": torch.zeros(64, 3).to(like),
    }
    if config.guidance_embeds:
        conditioning["guidance"] = torch.full((1,), 3.5).to(like)
    return noise(1, side * side, config.in_channels), conditioning


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--side", type=int, default=64, help="tokens along a side of the image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)

    transformer = FluxTransformer2DModel.from_pretrained(
        arguments.model, subfolder="transformer", torch_dtype=torch.bfloat16
    ).to(arguments.device)
    dbcache.enable(
        BlockAdapter(
            transformer=transformer,
            blocks=[transformer.transformer_blocks, transformer.single_transformer_blocks],
            forward_pattern=ForwardPattern.Pattern_1,
        ),
        DBCacheConfig(Fn_compute_blocks=1, num_inference_steps=arguments.steps),
    )
    for seed in (0, 1):  # the second image begins anew by itself
        latents, conditioning = inputs(transformer, arguments.side, seed)
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(arguments.steps, device=latents.device)
        for t in scheduler.timesteps:
            time = (t / 1000).expand(1).to(latents)
            velocity = transformer(latents, timestep=time, return_dict=False, **conditioning)[0]
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        dbcache.summary(transformer)
    return latents


if __name__ == "__main__":
    main()
