"""SeaCache's filter: what of a noisy latent is signal, by frequency (arXiv:2602.18993).

With x = (1 - s) * image + s * noise, and images whose power falls as S(f) = |f|^-p, the best linear
estimate of the image has the gain

    G(f) = product over axes of  (1 - s) S / ((1 - s)^2 S + s^2),    then divided by its mean

so that early steps compare the coarse structure, which is all that is there, and late ones the
detail as well. p is 2 for images and 3 for videos, as in the paper.
"""

from __future__ import annotations

import functools

import torch

IMAGE_POWER = 2.0
VIDEO_POWER = 3.0
TINY = 1e-16
"""Keeps S finite at frequency 0."""
EDGE = 1e-6
"""Closest that s comes to 0 and to 1, where the gain degenerates."""


def sea_filter(x: torch.Tensor, sigma: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Return `x` with the gain applied along `axes`.

    Args:
        x: (B, ...), any floating dtype.
        sigma: share of noise s of each sample, (B,) or (), from 0 to 1, on the device of `x`.
        axes: two of an image, or three of a video; not the first.

    Returns:
        float32, as `x`. Nothing is read on the host.
    """
    power = VIDEO_POWER if len(axes) == 3 else IMAGE_POWER
    s = sigma.float().clamp(EDGE, 1 - EDGE).reshape(-1, *[1] * (x.ndim - 1))
    gains = []
    for axis in axes:
        frequency = torch.fft.fftfreq(x.shape[axis], device=x.device, dtype=torch.float32)
        signal = 1 / (frequency.abs().pow(power) + TINY)
        signal = signal.reshape(-1, *[1] * (x.ndim - axis - 1))
        gains.append((1 - s) * signal / ((1 - s) ** 2 * signal + s**2 + TINY))
    gain = functools.reduce(torch.mul, gains)
    gain = gain / gain.mean(axes, keepdim=True)
    return torch.fft.ifftn(torch.fft.fftn(x.float(), dim=axes) * gain, dim=axes).real
