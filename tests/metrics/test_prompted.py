"""CLIP score and ImageReward: small models, loaded as the real ones are."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from made_weights import MEAN, SIDE, STD, made_image

from dbcache.metrics import WeightsError, compute_clip_score, compute_image_reward
from dbcache.metrics.clip_score import load_model as load_clip
from dbcache.metrics.image_reward import load_model as load_reward
from dbcache.metrics.image_reward import pixels
from dbcache.metrics.inputs import MetricWarning

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_reward_model_without_a_tokenizer_takes_that_of_the_hub(
    reward_model, tmp_path, monkeypatch
):
    copy = tmp_path / "copy"
    shutil.copytree(reward_model, copy)
    words = (copy / "vocab.txt").rename(tmp_path / "vocab.txt")
    asked = []

    def from_pretrained(name):
        asked.append(name)
        if not words.exists():
            raise OSError("no network")
        return transformers.BertTokenizer(str(words))

    monkeypatch.setattr(transformers.BertTokenizer, "from_pretrained", from_pretrained)
    key = (0, "the dog")
    value, _ = compute_image_reward(made_image(0, 48, 64), key[1], copy, device="cpu")
    assert asked == ["bert-base-uncased"]
    assert value == pytest.approx(REWARDS[key], rel=1e-3)
    words.unlink()
    load_reward.cache_clear()
    with pytest.raises(
        WeightsError, match=r"tokenizer bert-base-uncased could not be had \(no net"
    ):
        compute_image_reward(made_image(0, 48, 64), key[1], copy, device="cpu")


def test_a_tokenizer_without_words_is_refused(clip_model, reward_model, tmp_path):
    # transformers makes an empty one where the files are missing, and every word is unknown
    image = made_image(0, 48, 64)
    shutil.copytree(clip_model, tmp_path / "clip")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (tmp_path / "clip" / name).unlink(missing_ok=True)
    with pytest.raises(WeightsError, match="must hold the words of its tokenizer"):
        compute_clip_score(image, "a cat", tmp_path / "clip", device="cpu")
    shutil.copytree(reward_model, tmp_path / "reward")
    (tmp_path / "reward" / "vocab.txt").write_text("")
    with pytest.raises(WeightsError, match="it has no words"):
        compute_image_reward(image, "a cat", tmp_path / "reward", device="cpu")
