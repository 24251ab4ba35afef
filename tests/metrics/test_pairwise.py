"""PSNR, SSIM and MSE against closed forms and formulas in float64 that are written here."""

import math
import wave

import av
import numpy as np
import pytest
from made_weights import made_image
from PIL import Image
from scipy.ndimage import uniform_filter

from dbcache.metrics import (
    compute_mse,
    compute_psnr,
    compute_ssim,
    compute_video_mse,
    compute_video_psnr,
    compute_video_ssim,
)
from dbcache.metrics.inputs import MetricWarning


def scipy_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Mean SSIM of one channel in 0 ... 255 by SciPy's filter."""

    def blur(z):
        return uniform_filter(z, 7)[3:-3, 3:-3]

    x, y = x.astype(np.float64), y.astype(np.float64)
    ux, uy, scale = blur(x), blur(y), 49 / 48
    vx, vy = scale * (blur(x * x) - ux * ux), scale * (blur(y * y) - uy * uy)
    vxy = scale * (blur(x * y) - ux * uy)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return np.mean((2 * ux * uy + c1) * (2 * vxy + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2)))


@pytest.mark.parametrize("step", [1, 15, 16, 200])
def test_a_constant_difference_has_a_closed_form(step):
    # in uint8, differences of 16 and more would wrap around when squared
    true, test = np.full((9, 8, 3), 20, np.uint8), np.full((9, 8, 3), 20 + step, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert compute_mse(true, test) == (pytest.approx(step**2), 1)
    assert compute_psnr(test, true)[0] == pytest.approx(20 * math.log10(255 / step))
    assert compute_ssim(true, test)[0] == pytest.approx(
        (2 * 20 * (20 + step) + c1) / (20**2 + (20 + step) ** 2 + c1)
    )


@pytest.mark.parametrize("size", [(64, 64), (7, 9), (33, 50)])
def test_values_are_those_of_float64_formulas(size):
    x, y = made_image(0, *size), made_image(1, *size)
    error = np.mean((x.astype(np.float64) - y) ** 2)
    assert compute_mse(x, y)[0] == pytest.approx(error, rel=1e-12)
    assert compute_psnr(x, y)[0] == pytest.approx(10 * np.log10(65025 / error), rel=1e-12)
    expected = np.mean([scipy_ssim(x[..., c], y[..., c]) for c in range(3)])
    assert compute_ssim(x, y)[0] == pytest.approx(expected, rel=1e-9)


def test_values_are_those_of_scikit_image():
    # scikit-image 0.26.0: peak_signal_noise_ratio, structural_similarity(channel_axis=2)
    x, y = made_image(0), made_image(1)
    assert compute_psnr(x, y)[0] == pytest.approx(10.622256111752739, rel=1e-9)
    assert compute_ssim(x, y)[0] == pytest.approx(0.11791796019237392, rel=1e-9)
    assert compute_mse(x, y)[0] == pytest.approx(5634.491780598958, rel=1e-9)


def test_folders_are_matched_by_name_and_averaged(images, tmp_path):
    true = images("true", "b.png", "a.png", "sub.png")
    (true / "deep").mkdir()
    (true / "sub.png").rename(true / "deep" / "sub.png")
    test = images("test", "a.bmp", "b.bmp", "sub.bmp", seed=10)  # another order and ending
    (test / "deep").mkdir()
    (test / "sub.bmp").rename(test / "deep" / "sub.bmp")
    pairs = [(made_image(0), made_image(11)), (made_image(1), made_image(10))]
    pairs.append((made_image(2), made_image(12)))
    expected = np.mean([compute_psnr(x, y)[0] for x, y in pairs])
    assert compute_psnr(str(true), test) == (pytest.approx(expected), 3)


def test_equal_pairs_are_left_out_of_the_mean_with_a_warning():
    x, y = made_image(0), made_image(1)
    with pytest.warns(MetricWarning, match=r"compute_psnr: 2 of 3 pairs are equal"):
        value, count = compute_psnr([x, x, x], [x, y, x])
    assert (value, count) == (compute_psnr(x, y)[0], 3)


def test_equal_images_are_infinitely_good():
    x = made_image(0)
    assert compute_psnr(x, x) == (math.inf, 1)
    assert compute_ssim(x, x) == (1.0, 1)
    assert compute_mse([x, x], [x, x]) == (0.0, 2)


def test_arrays_pictures_files_and_floats_are_the_same_image(tmp_path):
    x, y = made_image(0), made_image(1)
    Image.fromarray(y).save(tmp_path / "y.png")
    expected = compute_psnr(x, y)[0]
    for form in (Image.fromarray(y), tmp_path / "y.png", [str(tmp_path / "y.png")], y[None]):
        assert compute_psnr(x, form) == (expected, 1)
    assert compute_psnr(x / 255, np.float32(y) / np.float32(255))[0] == pytest.approx(expected)


def test_grey_and_transparent_pictures_are_read_as_rgb(tmp_path):
    x, y = made_image(0), made_image(1)
    grey = x[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([y, grey])).save(tmp_path / "alpha.png")
    expected = compute_mse(np.repeat(grey[..., None], 3, 2), y)[0]
    assert compute_mse(tmp_path / "grey.png", tmp_path / "alpha.png")[0] == expected
    assert compute_mse(grey, y)[0] == expected


def test_pictures_are_turned_as_their_exif_data_say(tmp_path):
    picture = Image.fromarray(made_image(0, 16, 24))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    assert compute_mse(np.rot90(made_image(0, 16, 24), -1), tmp_path / "turned.png")[0] == 0


def write_video(path, frames):
    """Write frames without loss, so that they are read as they are."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame).reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


def test_videos_are_the_mean_over_frames(tmp_path):
    true, test = ([made_image(seed + i) for i in range(4)] for seed in (0, 20))
    a, b = write_video(tmp_path / "a.mkv", true), write_video(tmp_path / "b.mkv", test)
    assert compute_video_mse(a, b) == (pytest.approx(compute_mse(true, test)[0]), 4)
    assert compute_video_psnr(str(a), b) == (pytest.approx(compute_psnr(true, test)[0]), 4)
    assert compute_video_ssim(a, b) == (pytest.approx(compute_ssim(true, test)[0]), 4)


def test_folders_of_videos_are_matched_by_name(tmp_path):
    true, test = ([made_image(seed + i) for i in range(2)] for seed in (0, 20))
    for folder in ("true", "test"):
        (tmp_path / folder).mkdir()
    write_video(tmp_path / "true" / "x.mkv", true)
    write_video(tmp_path / "true" / "y.mkv", test)
    write_video(tmp_path / "test" / "x.avi", true)
    write_video(tmp_path / "test" / "y.avi", true)
    value, count = compute_video_mse(tmp_path / "true", tmp_path / "test")
    assert (value, count) == (pytest.approx(compute_mse(test, true)[0] / 2), 4)


def test_videos_of_different_length_or_size_are_refused(tmp_path):
    frames = [made_image(i) for i in range(4)]
    a = write_video(tmp_path / "a.mkv", frames)
    b = write_video(tmp_path / "b.mkv", frames[:3])
    c = write_video(tmp_path / "c.mkv", [frame[:32] for frame in frames])
    for pair in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=r"got 3 in .*b\.mkv and 4 in .*a\.mkv"):
            compute_video_psnr(*pair)
    with pytest.raises(ValueError, match=r"a\.mkv frame 0 64x64 and .*c\.mkv frame 0 64x32"):
        compute_video_ssim(a, c)


def test_what_is_no_video_is_refused_by_name(tmp_path):
    good = write_video(tmp_path / "a.mkv", [made_image(0)])
    (tmp_path / "no.mp4").write_bytes(b"text" * 100)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"no\.mp4: must be a video"):
        compute_video_psnr(good, tmp_path / "no.mp4")
    with pytest.raises(ValueError, match=r"folder must hold files ending in \.avi"):
        compute_video_psnr(tmp_path / "folder", tmp_path / "folder")
    write_video(tmp_path / "folder" / "a.mkv", [made_image(0)])
    with pytest.raises(ValueError, match="two files or two folders"):
        compute_video_psnr(good, tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4"):
        compute_video_psnr(good, tmp_path / "absent.mp4")


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    with pytest.raises(ValueError, match=r"sound\.wav: must hold a video stream"):
        compute_video_psnr(path, path)
