"""The Inception v3 of FID, whose features make two sets of images comparable.

Architecture: Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision", in
the variant of the TensorFlow graph of 2015-12-05 that all published FIDs use: average pooling
leaves the padding out of its mean, and the last block pools with the maximum. Names of the
parameters are those of torchvision's `Inception3`, which the weight file of pytorch-fid
(github.com/mseitzer/pytorch-fid) has.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 299
"""Height and width that images are resized to, bilinearly."""

STAGES = {64: 1, 192: 2, 768: 3, 2048: 4}
"""How many stages of the network run, by the number of features."""


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch normalisation with eps 0.001, ReLU."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


Arguments: TypeAlias = dict[str, Any]
Branches: TypeAlias = dict[str, list[tuple[str, int, Arguments]]]

ROW, COLUMN = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
SQUARE, HALVED = {"kernel": 3, "padding": 1}, {"kernel": 3, "stride": 2}
FORK: dict[str, Arguments] = {
    "a": {"kernel": (1, 3), "padding": (0, 1)},
    "b": {"kernel": (3, 1), "padding": (1, 0)},
}


class Mixed(nn.Module):
    """Branches side by side on one input, their outputs concatenated over channels.

    Args:
        channels: of the input.
        branches: name to chain of convolutions, each (suffix of its name, output channels,
            arguments).
        pool: channels of the branch that pools first, or 0: the pooled input as it is.
        forked: branches whose last output goes through two convolutions, `a` and `b`.
        maximum: pool with the maximum rather than the mean.
    """

    def __init__(
        self,
        channels: int,
        branches: Branches,
        pool: int,
        forked: dict[str, tuple[str, int]] | None = None,
        maximum: bool = False,
    ) -> None:
        super().__init__()
        self.chains: dict[str, list[str]] = {}
        self.forks: dict[str, list[str]] = {}
        self.maximum = maximum
        for name, chain in branches.items():
            width = channels
            self.chains[name] = []
            for suffix, out, arguments in chain:
                self.add_module(name + suffix, ConvNormReLU(width, out, **arguments))
                self.chains[name].append(name + suffix)
                width = out
            if forked and name in forked:
                suffix, out = forked[name]
                self.forks[name] = [f"{name}{suffix}{side}" for side in FORK]
                for module, arguments in zip(self.forks[name], FORK.values(), strict=True):
                    self.add_module(module, ConvNormReLU(width, out, **arguments))
        if pool:
            self.branch_pool = ConvNormReLU(channels, pool)
        self.has_pool = pool > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for name, chain in self.chains.items():
            y = x
            for module in chain:
                y = self.get_submodule(module)(y)
            if name in self.forks:
                y = torch.cat([self.get_submodule(module)(y) for module in self.forks[name]], 1)
            outputs.append(y)
        outputs.append(self.branch_pool(self._pooled(x)) if self.has_pool else self._pooled(x))
        return torch.cat(outputs, 1)

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        if not self.has_pool:
            return F.max_pool2d(x, 3, stride=2)
        if self.maximum:
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _mixed_35(channels: int, pool: int) -> Mixed:
    """Blocks on 35x35 points."""
    five = {"kernel": 5, "padding": 2}
    branches: Branches = {
        "branch1x1": [("", 64, {})],
        "branch5x5": [("_1", 48, {}), ("_2", 64, five)],
        "branch3x3dbl": [("_1", 64, {}), ("_2", 96, SQUARE), ("_3", 96, SQUARE)],
    }
    return Mixed(channels, branches, pool)


def _mixed_17(inner: int) -> Mixed:
    """Blocks on 17x17 points, 768 channels, convolutions of 7x1 and 1x7."""
    deep = [("_1", inner, {}), ("_2", inner, COLUMN), ("_3", inner, ROW), ("_4", inner, COLUMN)]
    branches: Branches = {
        "branch1x1": [("", 192, {})],
        "branch7x7": [("_1", inner, {}), ("_2", inner, ROW), ("_3", 192, COLUMN)],
        "branch7x7dbl": [*deep, ("_5", 192, ROW)],
    }
    return Mixed(768, branches, 192)


def _mixed_8(channels: int, maximum: bool) -> Mixed:
    """Blocks on 8x8 points, with forks of 1x3 and 3x1."""
    branches: Branches = {
        "branch1x1": [("", 320, {})],
        "branch3x3": [("_1", 384, {})],
        "branch3x3dbl": [("_1", 448, {}), ("_2", 384, SQUARE)],
    }
    forked = {"branch3x3": ("_2", 384), "branch3x3dbl": ("_3", 384)}
    return Mixed(channels, branches, 192, forked, maximum)


def _to_17() -> Mixed:
    branches: Branches = {
        "branch3x3": [("", 384, HALVED)],
        "branch3x3dbl": [("_1", 64, {}), ("_2", 96, SQUARE), ("_3", 96, HALVED)],
    }
    return Mixed(288, branches, 0)


def _to_8() -> Mixed:
    branches: Branches = {
        "branch3x3": [("_1", 192, {}), ("_2", 320, HALVED)],
        "branch7x7x3": [
            ("_1", 192, {}),
            ("_2", 192, ROW),
            ("_3", 192, COLUMN),
            ("_4", 192, HALVED),
        ],
    }
    return Mixed(768, branches, 0)


def resize(images: torch.Tensor) -> torch.Tensor:
    """Return images (B, 3, H, W) at the size that the network takes."""
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


class InceptionFeatures(nn.Module):
    """Features of images, (B, 3, 299, 299) in [0, 1] to (B, dims).

    Args:
        dims: 2048 (before the classifier, what FID means), or 768, 192 or 64 from earlier stages,
            averaged over the picture. A FID of fewer features is a number of its own.
    """

    def __init__(self, dims: int = 2048) -> None:
        super().__init__()
        if dims not in STAGES:
            raise ValueError(f"InceptionFeatures: dims must be one of {sorted(STAGES)}, got {dims}")
        self.stages = STAGES[dims]
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3)
        self.Mixed_5b = _mixed_35(192, pool=32)
        self.Mixed_5c = _mixed_35(256, pool=64)
        self.Mixed_5d = _mixed_35(288, pool=64)
        self.Mixed_6a = _to_17()
        self.Mixed_6b = _mixed_17(128)
        self.Mixed_6c = _mixed_17(160)
        self.Mixed_6d = _mixed_17(160)
        self.Mixed_6e = _mixed_17(192)
        self.Mixed_7a = _to_8()
        self.Mixed_7b = _mixed_8(1280, maximum=False)
        self.Mixed_7c = _mixed_8(2048, maximum=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * images - 1)))
        x = F.max_pool2d(x, 3, stride=2)
        if self.stages > 1:
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        if self.stages > 2:
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        if self.stages > 3:
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))
