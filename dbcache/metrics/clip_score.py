"""CLIP score: how well a picture fits its prompt, by a CLIP model.

    score = temperature * cos(image features, text features)

The temperature of trained CLIP models is 100. Radford et al. 2021, "Learning Transferable Visual
Models From Natural Language Supervision"; Hessel et al. 2021, "CLIPScore".
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dbcache.metrics.inputs import Images, MetricWarning, PathLike, items, need, prompts_of
from dbcache.metrics.weights import WeightsError

if TYPE_CHECKING:
    import torch

MODEL = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
FOLDER = "CLIP_MODEL_DIR"
"""Environment variable that names the model, as cache-dit's does."""


def compute_clip_score(
    images: Images,
    prompts: PathLike | Sequence[str],
    clip_model_path: PathLike | None = None,
    *,
    device: str | None = None,
) -> tuple[float, int]:
    """Return the mean CLIP score, higher fits better, and the number of images.

    Args:
        images: as `compute_psnr` takes them; those of a folder in natural order of their names.
        prompts: one per image: a text file with a line each, or a list. One string that is no file
            is the prompt of every image.
        clip_model_path: a CLIP model for transformers, its folder or its name on the hub; None
            takes the variable `CLIP_MODEL_DIR`, else "laion/CLIP-ViT-g-14-laion2B-s12B-b42K".
            Scores of different models do not compare.
        device: where the model runs; the GPU where there is one.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: another number of prompts than of images, an empty prompt, a file that is no
            8-bit image.
        WeightsError: a model that cannot be had.
        ImportError: transformers or Pillow is missing.
    """
    from dbcache.metrics.devices import default_device

    who = "compute_clip_score"
    found = items(images, who)
    texts = prompts_of(prompts, len(found), who)
    path = os.fspath(clip_model_path or os.environ.get(FOLDER) or MODEL)
    model = load_model(path, default_device(device))
    scores = [model.score(item.read(), text) for item, text in zip(found, texts, strict=True)]
    model.warn_of_long(texts, who)
    return math.fsum(scores) / len(scores), len(scores)


class ClipModel:
    """A CLIP model with its tokenizer and its image processor."""

    def __init__(self, path: str, device: torch.device) -> None:
        transformers = need("transformers", "compute_clip_score")
        # the processor that needs no torchvision; before transformers 5 there is one only
        processor = getattr(transformers, "CLIPImageProcessorPil", None)
        try:
            self.model = transformers.CLIPModel.from_pretrained(path).to(device).eval()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            self.processor = (processor or transformers.CLIPImageProcessor).from_pretrained(path)
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"compute_clip_score: the CLIP model {path!r} could not be had ({error}); give a "
                f"folder or a hub name: clip_model_path=..., --clip-model or the variable {FOLDER}"
            ) from error
        if not has_words(self.tokenizer):
            raise WeightsError(f"compute_clip_score: {path} must hold the words of its tokenizer")
        self.limit = self.model.config.text_config.max_position_embeddings
        self.device = device

    def score(self, image: Any, prompt: str) -> float:
        """Return the score of one image (H, W, 3) in 0 ... 255 and one prompt."""
        import torch

        pixels = self.processor(image.round().astype("uint8"), return_tensors="pt")
        text = self.tokenizer(prompt, truncation=True, max_length=self.limit, return_tensors="pt")
        with torch.no_grad():
            output = self.model(
                input_ids=text["input_ids"].to(self.device),
                attention_mask=text["attention_mask"].to(self.device),
                pixel_values=pixels["pixel_values"].to(self.device),
            )
        return float(output.logits_per_image)

    def warn_of_long(self, prompts: Sequence[str], who: str) -> None:
        """Warn of prompts of which the model sees a part only."""
        warn_of_long(self.tokenizer, prompts, self.limit, who)


def has_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has words: transformers makes one without any where files are missing."""
    return len(tokenizer) > len(tokenizer.all_special_ids)


def warn_of_long(tokenizer: Any, prompts: Sequence[str], limit: int, who: str) -> None:
    """Warn of prompts with more tokens than the model takes."""
    long = sum(len(tokenizer(prompt, verbose=False)["input_ids"]) > limit for prompt in prompts)
    if long:
        warnings.warn(
            f"{who}: {long} of {len(prompts)} prompts are longer than the {limit} tokens that the "
            f"model takes; the rest of each is not scored",
            MetricWarning,
            stacklevel=4,
        )


@lru_cache(maxsize=1)
def load_model(path: str, device: torch.device) -> ClipModel:
    """Return the model; the last one is kept."""
    return ClipModel(path, device)
