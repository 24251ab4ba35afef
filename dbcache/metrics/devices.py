"""Where networks run, and images as they take them."""

from __future__ import annotations

import numpy as np
import torch

from dbcache.metrics.inputs import Array


def default_device(device: str | torch.device | None) -> torch.device:
    """Return the device; None is the GPU where there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def unit_tensor(image: Array, device: torch.device) -> torch.Tensor:
    """Return (H, W, 3) in 0 ... 255 as (1, 3, H, W) float32 in [0, 1]."""
    x = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return x.permute(2, 0, 1)[None].to(device)
