"""What a reader of the documentation has: a pipeline that takes a prompt, and loads by name."""

from typing import Any

import tiny
import torch
from diffusers import FluxPipeline
from PIL import Image

GIVEN = {
    "prompt_embeds": tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=1),
    "pooled_prompt_embeds": tiny.noise(1, 12, seed=2),
    "output_type": "latent",
}


class ReaderPipeline(FluxPipeline):
    """A tiny FLUX that draws something for any prompt, at any size, in pixels."""

    @classmethod
    def from_pretrained(cls, *_args: Any, **_options: Any) -> "ReaderPipeline":
        """Return one, whatever it is called."""
        pipe = cls(**tiny.pipeline("flux").components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def to(self, *_args: Any, **_options: Any) -> "ReaderPipeline":
        """Stay where it is: there is no GPU."""
        return self

    def __call__(self, prompt: str | list[str] | None = None, **options: Any) -> Any:
        """Draw small images in a few steps: as many steps as were asked for, 12 at most."""
        steps = min(options.pop("num_inference_steps", 12), 12)
        size = {"height": 64, "width": 64}
        given = {name: x for name, x in options.items() if name not in size} | GIVEN | size
        output = super().__call__(num_inference_steps=steps, **given)
        pixels = output.images[0][:, :3].float().sigmoid().mul(255).to(torch.uint8)
        output.images = [Image.fromarray(pixels.reshape(4, -1, 3).numpy())]
        return output
