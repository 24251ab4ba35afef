"""Bad input is refused at once, by the name of the file."""

import sys

import numpy as np
import pytest
import torch
from made_weights import made_image
from PIL import Image

from dbcache.metrics import compute_mse, compute_psnr, compute_ssim
from dbcache.metrics.inputs import files_in, items, need, prompts_of


def test_a_missing_path_is_named(images):
    with pytest.raises(FileNotFoundError, match=r"compute_psnr: '.*nowhere'"):
        compute_psnr(images("true", "a.png"), images("true", "a.png") / "nowhere")


def test_names_in_one_folder_only_are_listed(images):
    true = images("true", *(f"{i}.png" for i in range(6)))
    test = images("test", "0.png", "extra.png")
    with pytest.raises(ValueError, match=r"1\.png, .*2\.png, .*3\.png and 2 more without a match"):
        compute_psnr(true, test)
    for i in range(1, 6):
        (true / f"{i}.png").unlink()
    with pytest.raises(ValueError, match=r"extra\.png without a match in .*true"):
        compute_psnr(true, test)


def test_names_that_differ_in_their_ending_only_are_refused(images):
    folder = images("true", "a.png", "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg and .*a\.png|a\.png and .*a\.jpg"):
        compute_psnr(folder, folder)


def test_different_counts_are_refused(images):
    true = images("true", "a.png", "b.png")
    with pytest.raises(ValueError, match=r"got 2 references .* and 1 images"):
        compute_psnr(true, true / "a.png")
    with pytest.raises(ValueError, match="got 3 references"):
        compute_psnr([made_image(0)] * 3, [made_image(0)])
    with pytest.raises(ValueError, match="empty list"):
        compute_psnr([], [])


def test_different_sizes_are_refused_by_name(images):
    true, test = images("true", "a.png"), images("test", "a.png", size=(32, 48))
    with pytest.raises(ValueError, match=r"reference .*a\.png 64x64 and .*a\.png 48x32"):
        compute_mse(true, test)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"must hold files ending in \.bmp.*has none"):
        compute_psnr(tmp_path, tmp_path)


def test_unreadable_pictures_are_named(images, tmp_path):
    folder = images("true", "good.png", "bad.png")
    (folder / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.png: must be an image"):
        compute_psnr(folder, folder)
    data = (folder / "good.png").read_bytes()
    (folder / "bad.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"bad\.png: cannot be read"):
        compute_psnr(folder, folder)


def test_videos_in_place_of_pictures_are_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(bytes(100))
    with pytest.raises(
        ValueError, match=r"a\.mp4: must be an image .*; videos are for compute_vid"
    ):
        compute_psnr(tmp_path / "a.mp4", tmp_path / "a.mp4")
    frames = [Image.fromarray(made_image(i)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"a\.gif: must hold one picture, got 3"):
        compute_psnr(tmp_path / "a.gif", tmp_path / "a.gif")


def test_pictures_of_16_bits_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(
        ValueError, match=r"deep\.png: must have 8 bits per channel, got mode 'I;16"
    ):
        compute_psnr(tmp_path / "deep.png", tmp_path / "deep.png")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"must be \(H, W\) or \(H, W, 3\), got \(4, 4, 4\)"),
        (np.zeros(4, np.uint8), r"got \(4,\)"),
        (np.zeros((4, 4, 3), np.int64), "uint8, or floating point in .*got int64"),
        (np.full((4, 4, 3), 200.0), "must be in .*got 200 to 200"),
        (np.full((4, 4, 3), np.nan), "must be in .*got nan"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        compute_psnr(array, array)


def test_tensors_are_refused_with_what_to_give_instead():
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(TypeError, match=r"got Tensor; of a tensor .* give x\.permute"):
        compute_psnr(x, x)
    given = x.permute(0, 2, 3, 1).float().cpu().numpy()  # as the error says
    assert compute_mse(given, given) == (0.0, 2)


def test_ssim_needs_as_much_as_its_window():
    x = made_image(0, 6, 20)
    with pytest.raises(ValueError, match="at least 7x7 pixels, got 20x6"):
        compute_ssim(x, x)


def test_files_come_in_natural_order(images):
    folder = images("true", "img10.png", "img2.png", "img1.png")
    assert [p.name for p in files_in(folder, (".png",), "x")] == [
        "img1.png",
        "img2.png",
        "img10.png",
    ]
    assert [item.key for item in items(folder, "x")] == ["img1", "img2", "img10"]


def test_a_missing_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "dbcache-dit\[metrics\]"'):
        need("av", "compute_video_psnr")


def test_a_missing_pillow_says_how_to_install_it(monkeypatch, images):
    folder = images("true", "a.png")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"needs PIL\.Image; pip install"):
        compute_psnr(folder, folder)


def test_prompts_are_lines_a_list_or_one_for_all(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n  the dog \n\n")
    assert prompts_of(path, 2, "x") == ["a cat", "the dog"]
    assert prompts_of(str(path), 2, "x") == ["a cat", "the dog"]
    assert prompts_of(["a", "b"], 2, "x") == ["a", "b"]
    assert prompts_of("a cat", 3, "x") == ["a cat"] * 3
    assert prompts_of("word " * 200, 1, "x") == ["word " * 200]  # too long for a file's name


def test_prompts_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\nthe dog\n")
    with pytest.raises(ValueError, match=r"got 3 in .*prompts\.txt and 2 images"):
        prompts_of(path, 2, "x")
    with pytest.raises(ValueError, match=r"prompts\.txt, prompt 2: must be text, got ''"):
        prompts_of(path, 3, "x")
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        prompts_of("absent.txt", 1, "x")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"prompts\.txt: must be a text file in UTF-8"):
        prompts_of(path, 1, "x")
