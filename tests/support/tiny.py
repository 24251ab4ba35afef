"""Tiny real diffusers models and pipelines, and the denoising loops that drive them.

Every model is built from a config, filled from one seed, float32 on the CPU. A loop is closed:
the next input depends on the last output, so a wrong output on one step shows on all later ones.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)

TEXT_TOKENS = 6
TEXT_DIM = 24
BRANCHES = ("cond", "uncond")
CFG_SCALE = 2.5


def noise(*shape: int, seed: int) -> torch.Tensor:
    """Return standard normal noise that only depends on its arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(
    model: torch.nn.Module,
    seed: int,
    *,
    gain: float = 1.0,
    bias: float = 0.3,
    time: float = 1.0,
    cutoff: float = 8e-3,
) -> torch.nn.Module:
    """Fill the weights from `seed` so that residuals change smoothly and slowly over the steps.

    `gain` scales all matrices, `bias` the part of the modulation that does not depend on the time,
    `time` the part that does. Trained models are smooth in time; random ones are not, so the fast
    sinusoids of the time embedding are damped from `cutoff` on.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                if name.endswith("bias"):
                    weight.normal_(0, bias, generator=generator)
                continue
            weight.normal_(0, gain / weight[0].numel() ** 0.5, generator=generator)
            if "timestep_embedder.linear_1" in name or "time_embedder.linear_1" in name:
                half = weight.shape[1] // 2
                frequency = 1e4 ** (-torch.arange(half) / half)
                weight *= time / (1 + (frequency.repeat(2) / cutoff) ** 2)
    return model.eval()


def flux(seed: int = 0, double: int = 4, single: int = 6) -> FluxTransformer2DModel:
    """Return a FLUX.1 transformer of `double` + `single` blocks and width 32."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=12,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    return fill(model, seed)


def qwen(seed: int = 1, layers: int = 8) -> QwenImageTransformer2DModel:
    """Return a Qwen-Image transformer of `layers` blocks and width 32."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
    )
    return fill(model, seed)


def wan(seed: int = 2, layers: int = 8) -> WanTransformer3DModel:
    """Return a Wan transformer of `layers` blocks and width 24."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=48,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    return fill(model, seed, time=2.0)


@dataclass(frozen=True)
class Family:
    """One model family: how to build it, call it, and name its block lists."""

    name: str
    build: Callable[..., torch.nn.Module]
    lists: tuple[str, ...]
    encoder_first: bool | None
    """Whether blocks return (encoder, hidden); None where they return hidden states alone."""

    latent_shape: tuple[int, ...]

    def arguments(self, x: torch.Tensor, t: float, branch: str) -> dict:
        """Return the transformer's keyword arguments at time `t` in (0, 1]."""
        offset = 100 * BRANCHES.index(branch)
        batch = x.shape[0]
        text = noise(1, TEXT_TOKENS, TEXT_DIM, seed=11 + offset).expand(batch, -1, -1).to(x.dtype)
        time = torch.full((batch,), t)
        common = {"hidden_states": x, "encoder_hidden_states": text, "return_dict": False}
        if self.name == "flux":
            ids = torch.zeros(x.shape[1], 3)
            ids[:, 1] = torch.arange(x.shape[1]) // 4
            ids[:, 2] = torch.arange(x.shape[1]) % 4
            return common | {
                "timestep": time,
                "pooled_projections": noise(1, 12, seed=12 + offset).expand(batch, -1).to(x.dtype),
                "img_ids": ids,
                "txt_ids": torch.zeros(TEXT_TOKENS, 3),
            }
        if self.name == "qwen":
            return common | {
                "timestep": time,
                "encoder_hidden_states_mask": None,
                "img_shapes": [[(1, 4, 4)]] * batch,
            }
        return common | {"timestep": time * 1000}


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "flux", flux, ("transformer_blocks", "single_transformer_blocks"), True, (1, 16, 16)
        ),
        Family("qwen", qwen, ("transformer_blocks",), True, (1, 16, 16)),
        Family("wan", wan, ("blocks",), None, (1, 4, 3, 8, 8)),
    )
}


@torch.no_grad()
def denoise(
    model: torch.nn.Module,
    family: Family,
    steps: int,
    *,
    seed: int = 5,
    batch: int = 1,
    branches: tuple[str, ...] = ("cond",),
    named: bool = False,
) -> list[torch.Tensor]:
    """Integrate from noise with Euler steps and return every output of the model, in call order.

    `branches` are called in the given order on each step; `named` puts each call inside
    `model.cache_context(branch)`, as pipelines do.
    """
    dtype = next(model.parameters()).dtype
    x = noise(batch, *family.latent_shape[1:], seed=seed).to(dtype)
    outputs = []
    for step in range(steps):
        t = 1.0 - step / steps
        predictions = {}
        for branch in branches:
            with model.cache_context(branch) if named else nullcontext():
                predictions[branch] = model(**family.arguments(x, t, branch))[0]
            outputs.append(predictions[branch])
        velocity = predictions["cond"]
        if "uncond" in predictions:
            negative = predictions["uncond"]
            velocity = negative + CFG_SCALE * (velocity - negative)
        x = x - velocity / steps
    return outputs


def pipeline(name: str):
    """Return a tiny pipeline without text encoders and VAE: "flux", "qwen", "wan" or "wan2.2".

    Its class is new on each call, so that nothing patched on it outlives the test.
    """
    scheduler = FlowMatchEulerDiscreteScheduler()
    bare = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if name == "flux":
        base, bare["text_encoder_2"], bare["tokenizer_2"] = FluxPipeline, None, None
    else:
        base = QwenImagePipeline if name == "qwen" else WanPipeline
    if name == "wan2.2":
        bare |= {"transformer_2": wan(seed=3), "boundary_ratio": 0.5}
    transformer = FAMILIES[name.removesuffix("2.2")].build()
    pipe = type(base.__name__, (base,), {})(scheduler=scheduler, transformer=transformer, **bare)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def generate(pipe, steps: int, *, guided: bool = True, seed: int = 5) -> list[torch.Tensor]:
    """Call a tiny pipeline with ready embeddings and return the latents after every step."""
    text = {
        "prompt_embeds": noise(1, TEXT_TOKENS, TEXT_DIM, seed=11),
        "negative_prompt_embeds": noise(1, TEXT_TOKENS, TEXT_DIM, seed=111),
    }
    more = {"height": 64, "width": 64}
    scale = CFG_SCALE if guided else 1.0
    if isinstance(pipe, FluxPipeline):
        text["pooled_prompt_embeds"] = noise(1, 12, seed=12)
        text["negative_pooled_prompt_embeds"] = noise(1, 12, seed=112)
        more["true_cfg_scale"] = scale
    elif isinstance(pipe, QwenImagePipeline):
        text["prompt_embeds_mask"] = torch.ones(1, TEXT_TOKENS)
        text["negative_prompt_embeds_mask"] = torch.ones(1, TEXT_TOKENS)
        more["true_cfg_scale"] = scale
    else:
        more |= {"num_frames": 9, "guidance_scale": scale}
    if not guided:
        text = {key: value for key, value in text.items() if "negative" not in key}
    latents = []

    def keep(_pipe, _step, _time, tensors):
        latents.append(tensors["latents"])
        return {}

    pipe(
        **text,
        **more,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=keep,
    )
    return latents
