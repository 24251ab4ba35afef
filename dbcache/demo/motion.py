"""Moving digits, drawn and judged: what the video model was trained on, and how good it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dbcache.demo.moving_digits import DIRECTIONS, FRAMES, IMAGE_SIZE
from dbcache.demo.quality import load_originals

TRAVEL = 6.0
"""Pixels from the first frame to the last."""

ASIDE = 3.0
"""Most pixels from the middle at a right angle to the motion."""

DIGIT_PIXELS = 10
"""Width of a digit, whose original has 8 pixels."""


def move(
    images: torch.Tensor, directions: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return videos (B, 8, 16, 16) of digits (B, 8, 8) that cross the middle.

    Args:
        images: in [0, 1].
        directions: (B,), numbers of `DIRECTIONS`.
        generator: of the places aside of the middle.
    """
    along = torch.tensor(list(DIRECTIONS.values()))[directions]
    places = 2 * torch.rand(len(images), 1, generator=generator) - 1
    times = torch.linspace(-0.5, 0.5, FRAMES) * TRAVEL
    centres = along[:, None] * times[:, None] + (along.flip(1).abs() * places * ASIDE)[:, None]
    frames = images[:, None].repeat_interleave(FRAMES, 0)
    drawn = _sampled(frames, -centres.flatten(0, 1), IMAGE_SIZE / DIGIT_PIXELS)
    return drawn.reshape(-1, FRAMES, IMAGE_SIZE, IMAGE_SIZE)


def _sampled(images: torch.Tensor, shift: torch.Tensor, scale: float) -> torch.Tensor:
    """Return images (B, 1, h, w) on 16x16 pixels, read at (pixel + shift) * scale."""
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift * scale / (IMAGE_SIZE / 2)
    grid = F.affine_grid(theta, [len(theta), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def centres(videos: torch.Tensor) -> torch.Tensor:
    """Return the centre of mass (B, T, 2) of each frame, x and y in pixels from the middle."""
    ink = videos.clamp(0, 1) ** 2  # so that a faint ground counts little
    axis = torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2
    mass = ink.sum((-1, -2)).clamp_min(1e-6)
    x, y = (ink.sum(-2) * axis).sum(-1), (ink.sum(-1) * axis).sum(-1)
    return torch.stack([x, y], -1) / mass[..., None]


def moves_as_meant(videos: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return whether each video (B, 8, 16, 16) moves in its direction, (B,).

    From the first frame to the last the centre of mass must go at least half as far as in the
    training data, and at most a third of that aside.
    """
    where = centres(videos)
    along = torch.tensor(list(DIRECTIONS.values()))[directions]
    path = where[:, -1] - where[:, 0]
    forward = (path * along).sum(-1)
    aside = (path * along.flip(-1)).sum(-1).abs()
    return (forward >= TRAVEL / 2) & (aside <= TRAVEL / 3)


class FrameClassifier:
    """A support-vector classifier of single frames, trained on moved digits of the train split."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        images, labels = load_originals("train")
        generator = torch.Generator().manual_seed(0)
        directions = torch.randint(len(DIRECTIONS), (len(images),), generator=generator)
        videos = move(images, directions, generator)[:, :: FRAMES - 1]
        self._svc = SVC(gamma="scale", C=10.0).fit(
            _centred(videos).numpy(), labels.repeat_interleave(2).numpy()
        )

    def accuracy(self, videos: torch.Tensor, labels: torch.Tensor) -> float:
        """Return the fraction of frames of videos (B, T, 16, 16) that is read as `labels` (B,)."""
        read = torch.from_numpy(self._svc.predict(_centred(videos).numpy()))
        return (read == labels.repeat_interleave(videos.shape[1])).float().mean().item()


def _centred(videos: torch.Tensor) -> torch.Tensor:
    """Return frames (B * T, 256), each shifted so that its centre of mass is in the middle."""
    frames = videos.flatten(0, 1)[:, None]
    return _sampled(frames, centres(videos).flatten(0, 1), 1.0).flatten(1)
