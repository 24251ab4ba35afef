"""CLIP score and ImageReward: small models, loaded as the real ones are."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from made_weights import made_image

from dbcache.metrics import WeightsError, compute_clip_score, compute_image_reward
from dbcache.metrics.clip_score import load_model as load_clip
from dbcache.metrics.image_reward import pixels
from dbcache.metrics.inputs import MetricWarning

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 32
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
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


def clip_by_hand(folder, image: np.ndarray, tokens: list[int]) -> float:
    """Temperature times cosine, of tokens and pixels that are made here."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    x = (torch.from_numpy(image).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        vision = model.vision_model(pixel_values=x.permute(2, 0, 1)[None]).pooler_output
        text = model.text_model(input_ids=torch.tensor([tokens])).pooler_output
        a, b = model.visual_projection(vision)[0], model.text_projection(text)[0]
        return (model.logit_scale.exp() * a @ b / (a.norm() * b.norm())).item()


def test_clip_score_is_temperature_times_cosine(clip_model):
    image = made_image(0, SIDE, SIDE)
    expected = clip_by_hand(clip_model, image, [0, 2, 3, 1])
    value, count = compute_clip_score(image, "a cat", clip_model, device="cpu")
    assert (value, count) == (pytest.approx(expected, rel=1e-4), 1)
    assert compute_clip_score(image, "dog", clip_model, device="cpu")[0] != pytest.approx(expected)


def test_clip_score_of_a_folder_takes_a_line_per_picture(clip_model, images, tmp_path, monkeypatch):
    folder = images("test", "p2.png", "p10.png", "p1.png", size=(SIDE, SIDE))  # seeds 0, 1, 2
    (tmp_path / "prompts.txt").write_text("a cat\nthe dog\ndog\n".replace("the", "a"))
    monkeypatch.setenv("CLIP_MODEL_DIR", str(clip_model))
    value, count = compute_clip_score(folder, tmp_path / "prompts.txt", device="cpu")
    expected = np.mean([
        clip_by_hand(clip_model, made_image(2, SIDE, SIDE), [0, 2, 3, 1]),
        clip_by_hand(clip_model, made_image(0, SIDE, SIDE), [0, 2, 4, 1]),
        clip_by_hand(clip_model, made_image(1, SIDE, SIDE), [0, 4, 1]),
    ])  # fmt: skip
    assert (value, count) == (pytest.approx(expected, rel=1e-4), 3)


def test_prompts_that_are_cut_are_said(clip_model):
    image = made_image(0, SIDE, SIDE)
    with pytest.warns(MetricWarning, match="1 of 2 prompts are longer than the 8 tokens"):
        value, _ = compute_clip_score([image] * 2, ["cat", "a cat " * 9], clip_model, device="cpu")
    cut = clip_by_hand(clip_model, image, [0, 2, 3, 2, 3, 2, 3, 1])
    short = clip_by_hand(clip_model, image, [0, 3, 1])
    assert value == pytest.approx((cut + short) / 2, rel=1e-4)


def test_a_clip_model_that_cannot_be_had_is_said(tmp_path):
    image = made_image(0, SIDE, SIDE)
    with pytest.raises(WeightsError, match=r"CLIP model '.*' could not be had .*CLIP_MODEL_DIR"):
        compute_clip_score(image, "a cat", tmp_path, device="cpu")
    load_clip.cache_clear()


REWARDS = {
    (0, "a cat on the moon"): -5.199346542358398,
    (1, "a cat on the moon"): -7.590484142303467,
    (0, "the dog"): -8.00708293914795,
}
"""image-reward 1.5, `ImageReward.score`, with the weights of the fixture."""


@pytest.mark.parametrize(("seed", "prompt"), REWARDS)
def test_rewards_are_those_of_the_published_code(seed, prompt, reward_model):
    image = made_image(seed, 48, 64)
    value, count = compute_image_reward(image, prompt, reward_model, device="cpu")
    assert (value, count) == (pytest.approx(REWARDS[seed, prompt], rel=1e-3), 1)


def test_rewards_are_averaged_and_the_folder_may_come_from_the_environment(
    reward_model, monkeypatch
):
    monkeypatch.setenv("IMAGEREWARD_MODEL_DIR", str(reward_model))
    pictures = [made_image(0, 48, 64), made_image(1, 48, 64), made_image(0, 48, 64)]
    prompts = ["a cat on the moon", "a cat on the moon", "the dog"]
    value, count = compute_image_reward(pictures, prompts, device="cpu")
    assert (value, count) == (pytest.approx(np.mean(list(REWARDS.values())), rel=1e-3), 3)


def test_long_prompts_of_rewards_are_said(reward_model):
    with pytest.warns(MetricWarning, match="1 of 1 prompts are longer than the 35 tokens"):
        compute_image_reward(made_image(0), "cat " * 40, reward_model, device="cpu")


def test_reward_takes_the_middle_of_the_picture():
    image = made_image(0, 32, 48)
    x = (torch.from_numpy(image[:, 8:40]).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(pixels(image, 32), x.permute(2, 0, 1)[None])
    assert pixels(made_image(0, 100, 33), 64).shape == (1, 3, 64, 64)


def test_a_reward_model_that_is_not_whole_is_said(reward_model, tmp_path):
    image = made_image(0, 48, 64)
    with pytest.raises(WeightsError, match=r"needs ImageReward\.pt in .*THUDM/ImageReward"):
        compute_image_reward(image, "cat", tmp_path, device="cpu")
    copy = tmp_path / "copy"
    shutil.copytree(reward_model, copy)
    state = torch.load(copy / "ImageReward.pt", weights_only=True)
    del state["mlp.layers.7.bias"]
    torch.save(state, copy / "ImageReward.pt")
    with pytest.raises(WeightsError, match=r"'head\.4\.bias' is missing"):
        compute_image_reward(image, "cat", copy, device="cpu")
    torch.save({"x": torch.zeros(1)}, copy / "ImageReward.pt")
    with pytest.raises(WeightsError, match=r"must be ImageReward's, '.*patch_embed.*' is missing"):
        compute_image_reward(image, "cat", copy, device="cpu")
    (copy / "med_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"med_config\.json must be a JSON file"):
        compute_image_reward(image, "cat", copy, device="cpu")


def test_a_reward_model_without_its_words_is_refused(reward_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(reward_model, copy)
    (copy / "vocab.txt").unlink()
    with pytest.raises(WeightsError, match=r"tokenizer .* could not be had"):
        compute_image_reward(made_image(0, 48, 64), "cat", copy, device="cpu")
