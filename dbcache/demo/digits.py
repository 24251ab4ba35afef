"""The project's own small trained model: handwritten digits from a real `FluxPipeline`.

A `FluxTransformer2DModel` trained with flow matching on scikit-learn's handwritten digits
(`bench/train_digits.py`), 16x16 pixels as 64 tokens. The pixels play the latents, so no VAE is
needed, and the "text" is a one-hot code of the digit:

    pipe = load_pipeline()
    images = decode(pipe(**prompt([3, 7]), num_inference_steps=28).images)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

IMAGE_SIZE = 16
NUM_CLASSES = 10
NULL_CLASS = 10
"""The class of an empty prompt, for classifier-free guidance."""

TEXT_TOKENS = 4
TEXT_WIDTH = NUM_CLASSES + 1 + TEXT_TOKENS
WEIGHTS = Path(__file__).parent / "digits"
"""A diffusers model folder: config.json and fp16 safetensors."""

STUDENT = Path(__file__).parent / "digits_student"
"""The same, distilled to few steps (`bench/train_student.py`)."""

_PIXELS_PER_LATENT = 8  # what FluxPipeline assumes of a VAE when it is given none


def load_pipeline(
    path: str | Path = WEIGHTS,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FluxPipeline:
    """Return the trained model as a `FluxPipeline` without VAE and text encoders."""
    transformer = FluxTransformer2DModel.from_pretrained(path, torch_dtype=dtype)
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(transformer=transformer, scheduler=scheduler, **absent).to(device)


def prompt_embeds(classes: list[int] | torch.Tensor) -> torch.Tensor:
    """Return the one-hot text stream of `classes` (0-9, or `NULL_CLASS`).

    Shape (len(classes), TEXT_TOKENS, TEXT_WIDTH), float32: class one-hot, then token one-hot.
    """
    classes = torch.as_tensor(classes)
    embeds = torch.zeros(len(classes), TEXT_TOKENS, TEXT_WIDTH)
    embeds[torch.arange(len(classes)), :, classes] = 1.0
    embeds[:, torch.arange(TEXT_TOKENS), NUM_CLASSES + 1 + torch.arange(TEXT_TOKENS)] = 1.0
    return embeds


def prompt(digits: list[int], *, guidance: float = 1.0) -> dict[str, Any]:
    """Return the arguments with which a `FluxPipeline` call draws `digits`.

    Args:
        digits: one digit, 0 to 9, per image.
        guidance: classifier-free guidance scale; above 1 the pipeline calls the transformer
            twice per step (cond, uncond).
    """
    bad = [d for d in digits if d not in range(NUM_CLASSES)]
    if bad:
        raise ValueError(f"prompt: digits must be integers from 0 to 9, got {bad}")
    pooled = torch.zeros(len(digits), TEXT_WIDTH)
    arguments = {
        "prompt_embeds": prompt_embeds(digits),
        "pooled_prompt_embeds": pooled,
        "height": IMAGE_SIZE * _PIXELS_PER_LATENT,
        "width": IMAGE_SIZE * _PIXELS_PER_LATENT,
        "output_type": "latent",
    }
    if guidance > 1:
        arguments["true_cfg_scale"] = guidance
        arguments["negative_prompt_embeds"] = prompt_embeds([NULL_CLASS] * len(digits))
        arguments["negative_pooled_prompt_embeds"] = pooled
    return arguments


def encode(images: torch.Tensor) -> torch.Tensor:
    """Pack images (B, 16, 16) in [0, 1] into tokens (B, 64, 4) in [-1, 1]."""
    return F.pixel_unshuffle(2 * images[:, None] - 1, 2).flatten(2).mT


def decode(tokens: torch.Tensor) -> torch.Tensor:
    """Unpack tokens (B, 64, 4) into images (B, 16, 16) in [0, 1], float32 on the CPU."""
    patches = tokens.float().cpu().mT.unflatten(2, (IMAGE_SIZE // 2, IMAGE_SIZE // 2))
    return (F.pixel_shuffle(patches, 2)[:, 0] / 2 + 0.5).clamp(0, 1)
