"""Folders of pictures and of made-up weights."""

import json

import numpy as np
import pytest
import torch
import transformers
from made_weights import (
    MEAN,
    MED,
    SIDE,
    STD,
    WORDS,
    float_shapes,
    made_image,
    made_state,
    reward_state,
    save_lpips,
)
from PIL import Image

from dbcache.metrics.networks.inception import InceptionFeatures
from dbcache.metrics.weights import INCEPTION


@pytest.fixture
def images(tmp_path):
    """Write pictures into folders below a fresh one; the folder and the writer."""

    def write(folder: str, *names: str, seed: int = 0, noise: int = 0, size=(64, 64)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(names):
            picture = made_image(seed + i, *size).astype(int)
            if noise:
                shift = np.random.RandomState(seed + i).randint(-noise, noise + 1, picture.shape)
                picture = picture + shift
            Image.fromarray(np.uint8(np.clip(picture, 0, 255))).save(tmp_path / folder / name)
        return tmp_path / folder

    return write


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder with made-up weights of LPIPS (AlexNet) and FID under their published names."""
    folder = tmp_path_factory.mktemp("weights")
    save_lpips(folder, "alex")
    shapes = float_shapes(InceptionFeatures()) | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    torch.save(made_state(shapes), folder / INCEPTION.name)
    return folder


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory):
    """A folder as ImageReward's on the hub, small, with a BERT tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("reward")
    torch.save(reward_state(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory):
    """A folder as a CLIP model's on the hub, small, with made-up words."""
    folder = tmp_path_factory.mktemp("clip")
    words = [
        "a</w>",
        "cat</w>",
        "dog</w>",
        "c",
        "d",
        "a",
        "t</w>",
        "g</w>",
        "o",
        "at</w>",
        "og</w>",
    ]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *words]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    merges = ["#version: 0.2", "a t</w>", "o g</w>", "c at</w>", "d og</w>"]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text = {**small, "vocab_size": 13, "max_position_embeddings": 8, "num_attention_heads": 2}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**small, "image_size": SIDE, "patch_size": 8, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    processor = {"crop_size": size, "size": {"shortest_edge": SIDE}, "image_mean": MEAN}
    processor |= {"image_std": STD, "image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
