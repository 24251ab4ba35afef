"""How good a picture is: PSNR and SSIM against a reference, and a classifier of real digits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

SSIM_WINDOW = 7


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean over images of 10 log10(1 / MSE), in dB; inf where they are equal.

    Args:
        images: (B, H, W) in [0, 1].
        reference: same shape and range.
    """
    error = (images.double() - reference.double()).square().mean((1, 2))
    return (-10 * error.log10()).mean().item()


def ssim(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean structural similarity, in [-1, 1], with a uniform 7x7 window.

    Wang et al. 2004, "Image quality assessment": K1 = 0.01, K2 = 0.03, data range 1, sample
    covariance, as scikit-image's `structural_similarity` computes it by default.

    Args:
        images: (B, H, W) in [0, 1], H and W of at least 7.
        reference: same shape and range.
    """
    x, y = images.double()[:, None], reference.double()[:, None]

    def mean(z: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(z, SSIM_WINDOW, stride=1)

    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    mean_x, mean_y = mean(x), mean(y)
    var_x = unbiased * (mean(x * x) - mean_x * mean_x)
    var_y = unbiased * (mean(y * y) - mean_y * mean_y)
    cov = unbiased * (mean(x * y) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.mean().item()


def load_digits_split(split: Literal["train", "test"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scikit-learn's handwritten digits: images (B, 16, 16) in [0, 1] and labels (B,).

    The 8x8 originals are enlarged bilinearly. Every fifth image is the test split.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)[:, 0]
    labels = torch.from_numpy(data.target).long()
    is_test = torch.arange(len(labels)) % 5 == 0
    keep = is_test if split == "test" else ~is_test
    return images[keep], labels[keep]


class DigitClassifier:
    """A support-vector classifier trained on the real digits of the train split only."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        images, labels = load_digits_split("train")
        self._svc = SVC(gamma="scale", C=10.0).fit(images.flatten(1).numpy(), labels.numpy())

    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Return the fraction of `images` (B, 16, 16) that is read as `labels` (B,)."""
        read = torch.from_numpy(self._svc.predict(images.flatten(1).numpy()))
        return (read == labels).float().mean().item()
