"""Weights and images made by a formula, so that published implementations can be given the same."""

import math
import zlib

import numpy as np
import torch

from dbcache.metrics.networks.perceptual import PerceptualDistance
from dbcache.metrics.weights import BACKBONES, HEADS

MED = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": 48,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 40,
    "encoder_width": 128,
    "add_cross_attention": True,
}
"""A small `med_config.json`, BLIP's file of the text encoder."""

SIDE = 32
"""Height and width that the small CLIP model takes."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of pixels in [0, 1]."""

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "on", "the", "moon"]


def made(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return weights that depend on name and shape only; RandomState's stream never changes."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var") or name.endswith("bn.weight"):
        values = random.random_sample(shape) + 0.5
    elif len(shape) > 1:
        values = random.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    else:
        values = random.standard_normal(shape) * 0.1
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def made_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: made(name, shape) for name, shape in shapes.items()}


def float_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(x.shape) for k, x in module.state_dict().items() if x.is_floating_point()}


def made_image(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Return a picture of waves and noise, (H, W, 3) uint8."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width][..., None]
    waves = np.sin(x * random.rand(3) * 0.4 + y * random.rand(3) * 0.3 + random.rand(3) * 6)
    return np.uint8(np.clip(128 + 80 * waves + random.standard_normal(waves.shape) * 15, 0, 255))


def save_lpips(folder, net):
    shapes = float_shapes(PerceptualDistance(net))
    backbone = {k: shape for k, shape in shapes.items() if k.startswith("features.")}
    torch.save(made_state(backbone | {"classifier.6.bias": (1000,)}), folder / BACKBONES[net].name)
    heads = {f"lin{i}.model.1.weight": shapes[f"heads.{i}"] for i in range(5)}
    torch.save({k: x.abs() for k, x in made_state(heads).items()}, folder / HEADS[net].name)


def reward_shapes(width=128, depth=3, patch=8, side=32) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of `ImageReward.pt`, as its own code names them, for small sizes."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (side // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        for name, out, into in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (out, into)
            shapes[f"blocks.{i}.{name}.bias"] = (out,)
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    found = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    found |= {f"blip.text_encoder.{name}": shape for name, shape in _text_shapes(width).items()}
    for i, out, into in ((0, 24, 48), (2, 16, 24), (4, 12, 16), (6, 8, 12), (7, 1, 8)):
        found |= {f"mlp.layers.{i}.weight": (out, into), f"mlp.layers.{i}.bias": (out,)}
    return found


def _text_shapes(encoder: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = MED["hidden_size"], MED["intermediate_size"]
    linear = {}
    for i in range(MED["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for kind, into in (("attention", hidden), ("crossattention", encoder)):
            linear[f"{layer}.{kind}.self.query"] = (hidden, hidden)
            linear[f"{layer}.{kind}.self.key"] = (hidden, into)
            linear[f"{layer}.{kind}.self.value"] = (hidden, into)
            linear[f"{layer}.{kind}.output.dense"] = (hidden, hidden)
            linear[f"{layer}.{kind}.output.LayerNorm"] = (hidden,)
        linear[f"{layer}.intermediate.dense"] = (inner, hidden)
        linear[f"{layer}.output.dense"] = (hidden, inner)
        linear[f"{layer}.output.LayerNorm"] = (hidden,)
    linear["embeddings.LayerNorm"] = (hidden,)
    shapes = {
        "embeddings.word_embeddings.weight": (MED["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (MED["max_position_embeddings"], hidden),
    }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def reward_state() -> dict[str, torch.Tensor]:
    """Return small weights of ImageReward; norms and embeddings large enough to matter."""
    state = made_state(reward_shapes())
    for name, x in state.items():
        if "orm" in name and name.endswith("weight"):
            state[name] = x + 1
        elif "word_embeddings" in name or "pos_embed" in name or "cls_token" in name:
            state[name] = x / x.std()
    return state
