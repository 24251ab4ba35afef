"""ImageReward: how much people would like a picture for its prompt, by a model of their choices."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbcache.metrics.clip_score import has_words, warn_of_long
from dbcache.metrics.inputs import Images, PathLike, items, need, prompts_of
from dbcache.metrics.weights import WeightsError, load_into, read_tensors

if TYPE_CHECKING:
    import torch

REPOSITORY = "THUDM/ImageReward"
TOKENIZER = "bert-base-uncased"
FOLDER = "IMAGEREWARD_MODEL_DIR"
"""Environment variable that names the folder of the model, as cache-dit's does."""

TOKENS = 35
"""Of a prompt, as ImageReward's own `score` cuts it."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of pixels in [0, 1], per channel."""


def compute_image_reward(
    images: Images,
    prompts: PathLike | Sequence[str],
    imagereward_model_path: PathLike | None = None,
    *,
    device: str | None = None,
) -> tuple[float, int]:
    """Return the mean ImageReward, higher is liked more, and the number of images.

    A reward of 0 is the mean of the model's training set, 1 is one standard deviation above.

    Args:
        images: as `compute_psnr` takes them; those of a folder in natural order of their names.
        prompts: as `compute_clip_score` takes them; the model reads 35 tokens of each.
        imagereward_model_path: folder with `ImageReward.pt`, `med_config.json` and the tokenizer
            of "bert-base-uncased" (`vocab.txt` or `tokenizer.json`), which comes from the hub if
            it is not there; None takes the variable `IMAGEREWARD_MODEL_DIR`, else
            "THUDM/ImageReward" on the hub.
        device: where the model runs; the GPU where there is one.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: another number of prompts than of images, an empty prompt, a file that is no
            8-bit image.
        WeightsError: a model that cannot be had or does not fit.
        ImportError: transformers or Pillow is missing.
    """
    from dbcache.metrics.devices import default_device

    who = "compute_image_reward"
    found = items(images, who)
    texts = prompts_of(prompts, len(found), who)
    folder = imagereward_model_path or os.environ.get(FOLDER) or None
    model = load_model(None if folder is None else os.fspath(folder), default_device(device))
    scores = [model.score(item.read(), text) for item, text in zip(found, texts, strict=True)]
    warn_of_long(model.tokenizer, texts, TOKENS, who)
    return math.fsum(scores) / len(scores), len(scores)


class RewardModel:
    """ImageReward with its tokenizer."""

    def __init__(self, folder: str | None, device: torch.device) -> None:
        who = "compute_image_reward"
        transformers = need("transformers", who)
        weights, config = (_file(folder, name) for name in ("ImageReward.pt", "med_config.json"))
        state = read_tensors(weights, who)
        from dbcache.metrics.networks.reward import RewardNetwork

        try:
            fields = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{who}: {config} must be a JSON file ({error})") from error
        try:
            network = RewardNetwork(state, fields)
        except KeyError as error:
            raise WeightsError(
                f"{who}: {weights} must be ImageReward's, {error} is missing"
            ) from error
        load_into(network, network.own_names(state), weights, who)
        words = folder if folder is not None and _has_tokenizer(folder) else TOKENIZER
        try:
            self.tokenizer = transformers.BertTokenizer.from_pretrained(words)
        except (OSError, ValueError) as error:
            raise WeightsError(_no_model(f"the tokenizer {words}", error)) from error
        if not has_words(self.tokenizer):
            raise WeightsError(_no_model(f"the tokenizer {words}", "it has no words"))
        self.network = network.to(device)
        self.device = device

    def score(self, image: Any, prompt: str) -> float:
        """Return the reward of one image (H, W, 3) in 0 ... 255 for one prompt."""
        import torch

        text = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        with torch.no_grad():
            reward = self.network(
                pixels(image, self.network.side).to(self.device),
                text["input_ids"].to(self.device),
                text["attention_mask"].to(self.device),
            )
        return float(reward)


def pixels(image: Any, side: int) -> torch.Tensor:
    """Return an image as the network takes it, (1, 3, side, side).

    The shorter side is resized to `side`, bicubically, and the middle is cut out.
    """
    import numpy as np
    import torch

    pillow = need("PIL.Image", "compute_image_reward")
    picture = pillow.fromarray(image.round().astype("uint8"))
    width, height = picture.size
    short = min(width, height)
    resized = (side * width // short, side * height // short)
    picture = picture.resize(resized, pillow.Resampling.BICUBIC)
    left, top = round((resized[0] - side) / 2), round((resized[1] - side) / 2)
    picture = picture.crop((left, top, left + side, top + side))
    x = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    x = (x - torch.tensor(MEAN)) / torch.tensor(STD)
    return x.permute(2, 0, 1)[None]


def _has_tokenizer(folder: str) -> bool:
    return any((Path(folder) / name).is_file() for name in ("vocab.txt", "tokenizer.json"))


def _file(folder: str | None, name: str) -> Path:
    if folder is not None:
        path = Path(folder).expanduser() / name
        if not path.is_file():
            raise WeightsError(
                f"compute_image_reward: needs {name} in {folder}, not found; it is in {REPOSITORY} "
                f"on the hub"
            )
        return path
    hub = need("huggingface_hub", "compute_image_reward")
    try:
        return Path(hub.hf_hub_download(repo_id=REPOSITORY, filename=name))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise WeightsError(_no_model(f"{name} of {REPOSITORY}", error)) from error


def _no_model(what: str, error: Exception | str) -> str:
    return (
        f"compute_image_reward: {what} could not be had ({error}); give a folder with "
        f"ImageReward.pt, med_config.json and a BERT tokenizer: imagereward_model_path=..., "
        f"--reward-model or the variable {FOLDER}"
    )


@lru_cache(maxsize=1)
def load_model(folder: str | None, device: torch.device) -> RewardModel:
    """Return the model; the last one is kept."""
    return RewardModel(folder, device)
