"""The measures of quality, against independent formulas."""

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from dbcache.demo.quality import DigitClassifier, load_digits_split, psnr, ssim


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(3, 16, 16, generator=generator)
    noise = 0.1 * torch.randn(3, 16, 16, generator=generator)
    return (reference + noise).clamp(0, 1), reference


def test_psnr_is_ten_log10_of_one_over_the_mean_squared_error(pair):
    images, reference = (x.double().numpy() for x in pair)
    errors = [np.mean((a - b) ** 2) for a, b in zip(images, reference, strict=True)]
    assert psnr(*pair) == pytest.approx(np.mean([10 * np.log10(1 / e) for e in errors]))
    assert psnr(pair[0], pair[0]) == float("inf")


def test_ssim_is_that_of_the_uniform_window(pair):
    scores = []
    for x, y in zip(*(z.double().numpy() for z in pair), strict=True):
        blur = lambda z: uniform_filter(z, 7)  # noqa: E731
        ux, uy, scale = blur(x), blur(y), 49 / 48
        vx, vy = scale * (blur(x * x) - ux * ux), scale * (blur(y * y) - uy * uy)
        vxy = scale * (blur(x * y) - ux * uy)
        c1, c2 = 0.01**2, 0.03**2
        score = (2 * ux * uy + c1) * (2 * vxy + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
        scores.append(score[3:-3, 3:-3].mean())
    assert ssim(*pair) == pytest.approx(np.mean(scores))
    assert ssim(pair[0], pair[0]) == pytest.approx(1.0)
    as_video = [x[None] for x in pair]  # frames count alike
    assert ssim(*as_video) == pytest.approx(np.mean(scores))


def test_classifier_reads_real_digits_that_it_has_not_seen():
    train, test = (load_digits_split(split)[0] for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    assert DigitClassifier().accuracy(*load_digits_split("test")) > 0.97
