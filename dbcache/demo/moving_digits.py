"""The project's small trained video model: moving digits from a real `WanPipeline`.

A `WanTransformer3DModel` trained with flow matching (`bench/train_moving_digits.py`) on
scikit-learn's handwritten digits, moved across 8 frames of 16x16 pixels: 64 tokens. The pixels play
the latents, so no VAE is needed. The "text" is a one-hot code of the digit and of the direction:

    pipe = load_pipeline()
    videos = decode(pipe(**prompt([(3, "right"), (7, "up")]), num_inference_steps=28).frames)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

FRAMES, IMAGE_SIZE = 8, 16
NUM_DIGITS = 10
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
"""Of motion: x and y, y downwards."""

EMPTY = (NUM_DIGITS, len(DIRECTIONS))
"""Digit and direction of an empty prompt, for classifier-free guidance."""

TEXT_TOKENS = 4
TEXT_WIDTH = NUM_DIGITS + 1 + len(DIRECTIONS) + 1 + TEXT_TOKENS
GUIDANCE = 4.0
"""Guidance scale by default; above 1 the pipeline calls the transformer twice per step."""

WEIGHTS = Path(__file__).parent / "moving_digits"
"""A diffusers model folder: config.json and fp16 safetensors."""

_PIXELS_PER_LATENT, _FRAMES_PER_LATENT = 8, 4  # what WanPipeline assumes of a VAE if given none


def load_pipeline(
    path: str | Path = WEIGHTS,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WanPipeline:
    """Return the trained model as a `WanPipeline` without VAE and text encoder."""
    transformer = WanTransformer3DModel.from_pretrained(path, torch_dtype=dtype)
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(transformer=transformer, scheduler=scheduler, **absent).to(device)


def text_embeds(digits: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return the one-hot text stream of digits and directions, by number or `EMPTY`'s.

    Shape (B, TEXT_TOKENS, TEXT_WIDTH), float32: digit, direction and token, each one-hot.
    """
    rows = torch.arange(len(digits))
    embeds = torch.zeros(len(digits), TEXT_TOKENS, TEXT_WIDTH)
    embeds[rows, :, digits] = 1.0
    embeds[rows, :, NUM_DIGITS + 1 + directions] = 1.0
    embeds[:, torch.arange(TEXT_TOKENS), torch.arange(-TEXT_TOKENS, 0)] = 1.0
    return embeds


def prompt(videos: Sequence[tuple[int, str]], *, guidance: float = GUIDANCE) -> dict[str, Any]:
    """Return the arguments with which a `WanPipeline` call draws `videos`.

    Args:
        videos: digit, 0 to 9, and direction, a key of `DIRECTIONS`, of each video.
        guidance: classifier-free guidance scale; 1 is one call of the transformer per step.

    Raises:
        ValueError: another digit or direction.
    """
    names = list(DIRECTIONS)
    bad = [v for v in videos if v[0] not in range(NUM_DIGITS) or v[1] not in names]
    if bad:
        raise ValueError(
            f"prompt: videos must be pairs of a digit from 0 to 9 and one of {', '.join(names)}, "
            f"got {bad}"
        )
    digits = torch.tensor([digit for digit, _ in videos])
    directions = torch.tensor([names.index(direction) for _, direction in videos])
    empty = (torch.full_like(digits, number) for number in EMPTY)
    return {
        "prompt_embeds": text_embeds(digits, directions),
        "negative_prompt_embeds": text_embeds(*empty),
        "guidance_scale": guidance,
        "height": IMAGE_SIZE * _PIXELS_PER_LATENT,
        "width": IMAGE_SIZE * _PIXELS_PER_LATENT,
        "num_frames": (FRAMES - 1) * _FRAMES_PER_LATENT + 1,
        "output_type": "latent",
    }


def encode(videos: torch.Tensor) -> torch.Tensor:
    """Return videos (B, 8, 16, 16) in [0, 1] as latents (B, 1, 8, 16, 16) in [-1, 1]."""
    return 2 * videos[:, None] - 1


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Return latents (B, 1, 8, 16, 16) as videos (B, 8, 16, 16) in [0, 1], float32 on the CPU."""
    return (latents.float().cpu()[:, 0] / 2 + 0.5).clamp(0, 1)
