"""PSNR, SSIM and MSE: how far an image is from the one that the plain model draws.

    MSE  = mean((x - y)^2)                       0 ... 65025, in squared steps of 1/255; 0 is equal
    PSNR = 10 log10(255^2 / MSE)                 dB; infinite where equal
    SSIM = mean of (2 mx my + c1)(2 cov + c2) / ((mx^2 + my^2 + c1)(vx + vy + c2))    1 where equal

All in float64. SSIM is that of Wang et al. 2004, "Image quality assessment: from error visibility
to structural similarity", with a uniform window of 7x7, sample variances and K1 = 0.01, K2 = 0.03,
averaged over the channels, which is what scikit-image computes by default.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from dbcache.metrics.inputs import Array, Images, MetricWarning, PathLike, frame_pairs, image_pairs

WINDOW = 7


def mse(true: Array, test: Array) -> float:
    """Return the mean squared difference of two arrays of the same shape, in float64."""
    return float(np.mean((true.astype(np.float64) - test.astype(np.float64)) ** 2))


def psnr(true: Array, test: Array, data_range: float = 255.0) -> float:
    """Return 10 log10(data_range^2 / MSE) in dB; inf where the arrays are equal."""
    error = mse(true, test)
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(true: Array, test: Array, data_range: float = 255.0) -> float:
    """Return the mean structural similarity, in [-1, 1].

    Args:
        true: (H, W) or (H, W, C) with H and W of at least 7.
        test: same shape.
        data_range: the largest value minus the smallest one that the format can hold.

    Raises:
        ValueError: H or W is below 7.
    """
    if min(true.shape[:2]) < WINDOW:
        size = f"{true.shape[1]}x{true.shape[0]}"
        raise ValueError(f"ssim: images must have at least {WINDOW}x{WINDOW} pixels, got {size}")
    x, y = true.astype(np.float64), test.astype(np.float64)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = unbiased * (_window_mean(x * x) - mean_x * mean_x)
    var_y = unbiased * (_window_mean(y * y) - mean_y * mean_y)
    cov = unbiased * (_window_mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return float(similarity.mean())


def _window_mean(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean of every whole window: (H, W, ...) -> (H - 6, W - 6, ...)."""
    rows, columns = x.shape[0] - WINDOW + 1, x.shape[1] - WINDOW + 1
    tall = sum((x[i : i + rows] for i in range(1, WINDOW)), x[:rows])
    both = sum((tall[:, i : i + columns] for i in range(1, WINDOW)), tall[:, :columns])
    return both / WINDOW**2


def mean_over_pairs(
    pairs: Iterable[tuple[Array, Array]], metric: Callable[[Array, Array], float], who: str
) -> tuple[float, int]:
    """Return the mean of a metric and the number of pairs.

    Infinite values (PSNR of equal images) are left out of the mean, with a warning; inf where all
    pairs are equal.
    """
    values = [metric(true, test) for true, test in pairs]
    finite = [value for value in values if value != math.inf]
    if not finite:
        return math.inf, len(values)
    if len(finite) < len(values):
        equal = len(values) - len(finite)
        warnings.warn(
            f"{who}: {equal} of {len(values)} pairs are equal, which is infinite; the mean is that "
            f"of the other {len(finite)}",
            MetricWarning,
            stacklevel=3,
        )
    return math.fsum(finite) / len(finite), len(values)


def compute_psnr(image_true: Images, image_test: Images) -> tuple[float, int]:
    """Return the mean peak signal-to-noise ratio in dB, higher is closer, and the number of pairs.

    Args:
        image_true: the reference: a file, a folder, an array (H, W, 3) or (B, H, W, 3) of uint8 or
            of floating point in [0, 1], a Pillow image, or a list of these.
        image_test: as many images. Files of two folders, sub-folders included, are matched by
            their names without ending, everything else in order.

    Returns:
        Mean and count. Equal pairs are counted, but have no finite PSNR: they are left out of the
        mean, with a warning, and the mean is inf where all are equal.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: counts, names or sizes that do not match, or a file that is no 8-bit image.
    """
    who = "compute_psnr"
    return mean_over_pairs(image_pairs(image_true, image_test, who), psnr, who)


def compute_ssim(image_true: Images, image_test: Images) -> tuple[float, int]:
    """Return the mean structural similarity, at most 1, higher is closer, and the number of pairs.

    Arguments and errors are those of `compute_psnr`; images must have at least 7x7 pixels.
    """
    who = "compute_ssim"
    return mean_over_pairs(image_pairs(image_true, image_test, who), ssim, who)


def compute_mse(image_true: Images, image_test: Images) -> tuple[float, int]:
    """Return the mean squared error on 0 ... 255, lower is closer, and the number of pairs.

    Arguments and errors are those of `compute_psnr`.
    """
    who = "compute_mse"
    return mean_over_pairs(image_pairs(image_true, image_test, who), mse, who)


def compute_video_psnr(video_true: PathLike, video_test: PathLike) -> tuple[float, int]:
    """Return the mean PSNR over frames in dB, higher is closer, and the number of frames.

    Args:
        video_true: the reference: a video, or a folder of videos.
        video_test: the same; videos of two folders are matched by their names without ending.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: names, sizes or numbers of frames that do not match, or a file that is no video.
        ImportError: PyAV is missing.
    """
    who = "compute_video_psnr"
    return mean_over_pairs(frame_pairs(video_true, video_test, who), psnr, who)


def compute_video_ssim(video_true: PathLike, video_test: PathLike) -> tuple[float, int]:
    """Return the mean SSIM over frames and the number of frames, as `compute_video_psnr` does."""
    who = "compute_video_ssim"
    return mean_over_pairs(frame_pairs(video_true, video_test, who), ssim, who)


def compute_video_mse(video_true: PathLike, video_test: PathLike) -> tuple[float, int]:
    """Return the mean MSE over frames and the number of frames, as `compute_video_psnr` does."""
    who = "compute_video_mse"
    return mean_over_pairs(frame_pairs(video_true, video_test, who), mse, who)
