"""Activation shapes of real models: what the kernels see in one transformer call.

The counts follow from the models' published geometry:

    image    VAE 8x8 and 2x2 patches, so one token per 16x16 pixels
    video    VAE 4x8x8 and 1x2x2 patches, so one token per 4 frames of 16x16 pixels, where the
             first frame has a latent frame of its own: (frames - 1) / 4 + 1 latent frames

Encoder tokens count where the blocks hand them on (joint attention). Wan attends to its text by
cross-attention and returns hidden states only, so it has no encoder stream to cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One model at one size."""

    name: str
    hidden: int
    """Tokens of `hidden_states`."""
    encoder: int
    """Tokens of `encoder_hidden_states`, 0 if the blocks do not return them."""
    width: int
    """Channels per token, of both streams."""
    batch: int = 1
    dtype: str = "bf16"

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one tensor of hidden states."""
        return self.batch * self.hidden * self.width * DTYPES[self.dtype].itemsize

    @property
    def encoder_bytes(self) -> int:
        """Bytes of one tensor of encoder states."""
        return self.batch * self.encoder * self.width * DTYPES[self.dtype].itemsize


def image_tokens(height: int, width: int) -> int:
    """Tokens of an image of `height` x `width` pixels."""
    return (height // 16) * (width // 16)


def video_tokens(height: int, width: int, frames: int) -> int:
    """Tokens of a video of `frames` frames, 1 + a multiple of 4."""
    return ((frames - 1) // 4 + 1) * image_tokens(height, width)


SHAPES = {
    shape.name: shape
    for shape in (
        # FLUX.1 dev: 24 heads of 128, 512 text tokens
        # 512 / 16 = 32, 32 * 32 = 1024
        Shape(name="flux-512", hidden=image_tokens(512, 512), encoder=512, width=3072),
        # 64 * 64 = 4096
        Shape(name="flux-1024", hidden=image_tokens(1024, 1024), encoder=512, width=3072),
        # 128 * 128 = 16384
        Shape(name="flux-2048", hidden=image_tokens(2048, 2048), encoder=512, width=3072),
        # Qwen-Image: 24 heads of 128; 1328 / 16 = 83, 83 * 83 = 6889. Its text is as long as the
        # prompt; 512 is the most that the pipeline takes by default
        Shape(name="qwen-1328", hidden=image_tokens(1328, 1328), encoder=512, width=3072),
        # Wan 14B: 40 heads of 128; 81 frames are 21 latent frames
        # 21 * (480 / 16) * (832 / 16) = 21 * 30 * 52 = 32760
        Shape(name="wan-480p", hidden=video_tokens(480, 832, 81), encoder=0, width=5120),
        # 21 * 45 * 80 = 75600
        Shape(name="wan-720p", hidden=video_tokens(720, 1280, 81), encoder=0, width=5120),
        # HunyuanVideo: 24 heads of 128, 256 text tokens; 129 frames are 33 latent frames
        # 33 * 45 * 80 = 118800
        Shape(
            name="hunyuanvideo-720p",
            hidden=video_tokens(720, 1280, 129),
            encoder=256,
            width=3072,
        ),
        # FLUX.1 schnell, 4 steps at 512x512: at most 256 text tokens
        Shape(name="few-step-512", hidden=image_tokens(512, 512), encoder=256, width=3072),
    )
}


def parse(text: str) -> Shape:
    """Return the shape called `text`, or one spelt out as HIDDENxWIDTH or HIDDEN+ENCODERxWIDTH."""
    if text in SHAPES:
        return SHAPES[text]
    spelt = re.fullmatch(r"(\d+)(?:\+(\d+))?x(\d+)", text)
    if spelt is None or not int(spelt[1]) * int(spelt[3]):
        raise ValueError(
            f"bench.shapes: a shape must be one of {', '.join(SHAPES)}, or like 4096+512x3072, "
            f"got {text!r}"
        )
    hidden, encoder, width = int(spelt[1]), int(spelt[2] or 0), int(spelt[3])
    return Shape(name=text, hidden=hidden, encoder=encoder, width=width)
