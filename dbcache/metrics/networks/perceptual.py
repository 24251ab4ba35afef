"""LPIPS: weighted distance between the features of two images, calibrated on human judgement.

    LPIPS(x, y) = sum over layers of mean over points of  w . (f(x) / |f(x)| - f(y) / |f(y)|)^2

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
version 0.1 of its weights w (github.com/richzhang/PerceptualSimilarity). The features f are those
of AlexNet or VGG-16 after their ReLUs, with torchvision's ImageNet weights.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

Net = Literal["alex", "vgg"]

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of the input in [-1, 1], per channel: x -> (x - SHIFT) / SCALE."""

VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
"""Positions of the ReLUs whose outputs are compared."""

WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
SMALLEST = {"alex": 31, "vgg": 16}
"""Height and width below which a pooling layer has nothing left."""


def _alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for stage in VGG_WIDTHS:
        if layers:
            layers.append(nn.MaxPool2d(2, stride=2))
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


class PerceptualDistance(nn.Module):
    """Distance of images, two of (B, 3, H, W) in [0, 1] to (B,).

    Args:
        net: "alex" (the authors' choice for a metric) or "vgg".
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, net: Net = "alex") -> None:
        super().__init__()
        if net not in get_args(Net):
            raise ValueError(f"LPIPS: net must be one of {get_args(Net)}, got {net!r}")
        self.net = net
        self.features = _alexnet() if net == "alex" else _vgg16()
        self.heads = nn.ParameterList(torch.zeros(1, c, 1, 1) for c in WIDTHS[net])
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = (((2 * z - 1) - self.shift) / self.scale for z in (x, y))
        distance = x.new_zeros(x.shape[0])
        heads = iter(self.heads)
        for position, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if position in TAPS[self.net]:
                change = (_unit(x) - _unit(y)).square()
                distance = distance + (next(heads) * change).sum(1).mean((1, 2))
        return distance


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
