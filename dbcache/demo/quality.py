"""How good a picture is: PSNR and SSIM against a reference, and a classifier of real digits."""

from __future__ import annotations

from statistics import fmean
from typing import Literal

import torch
import torch.nn.functional as F

from dbcache.tuning import pictures


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean over images of 10 log10(1 / MSE), in dB; inf where they are equal.

    Args:
        images: (B, H, W), or videos (B, T, H, W), in [0, 1].
        reference: same shape and range.
    """
    pairs = zip(images, reference, strict=True)
    return fmean(pictures.psnr(image, like) for image, like in pairs)


def ssim(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean structural similarity, in [-1, 1], with a uniform 7x7 window.

    Wang et al. 2004, "Image quality assessment": K1 = 0.01, K2 = 0.03, data range 1, sample
    covariance, as scikit-image's `structural_similarity` computes it by default.

    Args:
        images: (B, H, W), or videos (B, T, H, W), in [0, 1], H and W of at least 7.
        reference: same shape and range.
    """
    pairs = zip(images.flatten(0, -3), reference.flatten(0, -3), strict=True)
    return fmean(pictures.similarity(image, like) for image, like in pairs)


def load_originals(split: Literal["train", "test"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scikit-learn's digits (B, 8, 8) in [0, 1] and labels (B,); every fifth is "test"."""
    from sklearn.datasets import load_digits

    data = load_digits()
    keep = (torch.arange(len(data.target)) % 5 == 0) == (split == "test")
    return torch.from_numpy(data.images).float()[keep] / 16, torch.from_numpy(data.target)[keep]


def load_digits_split(split: Literal["train", "test"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `load_originals`, enlarged bilinearly to images (B, 16, 16)."""
    images, labels = load_originals(split)
    images = F.interpolate(images[:, None], size=(16, 16), mode="bilinear", align_corners=False)
    return images[:, 0], labels


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
