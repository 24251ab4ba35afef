"""What is drawn while tuning: prompts or functions, and how close two outputs are.

Outputs are whatever a pipeline returns: Pillow images, arrays, tensors, lists of them, or an
object with `images`, `frames`, `audios` or `sample`. Tensors in floating point that leave [0, 1]
are latents: their PSNR is relative to the range of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dbcache.config.options import shown
from dbcache.metrics.pairwise import WINDOW, ssim

Draw = Callable[[Any], Any]
"""Draws on a pipeline, the same picture each time."""

_FIELDS = ("images", "frames", "audios", "sample")


def draws_of(
    who: str,
    prompts: Any,
    steps: int | None,
    options: Mapping[str, Any],
    *,
    is_told: bool = False,
) -> list[Draw]:
    """Return a function per prompt, each with a seed of its own.

    Args:
        who: what asks, for errors.
        prompts: prompts, dictionaries of arguments of the pipeline, functions of the pipeline, or
            one of these.
        steps: `num_inference_steps` of the calls, None where functions are given.
        options: more arguments of the calls.
        is_told: whether functions get the number of steps as a second argument.

    Raises:
        TypeError: an entry is none of those. ValueError: there is none.
    """
    single = isinstance(prompts, str | Mapping) or callable(prompts)
    entries = [prompts] if single else list(prompts)
    if not entries:
        raise ValueError(f"{who}: prompts must hold at least one, got none")
    if any(not callable(entry) for entry in entries) and steps is None:
        raise ValueError(f"{who}: num_inference_steps must be given with prompts, got None")
    if is_told:
        entries = [partial(_told, each, steps) if callable(each) else each for each in entries]
    return [_draw_of(who, entry, seed, steps, options) for seed, entry in enumerate(entries)]


def _told(entry: Callable[[Any, Any], Any], steps: int | None, pipe: Any) -> Any:
    return entry(pipe, steps)


def _draw_of(
    who: str, entry: Any, seed: int, steps: int | None, options: Mapping[str, Any]
) -> Draw:
    if callable(entry):
        return entry
    if not isinstance(entry, str | Mapping):
        raise TypeError(
            f"{who}: each prompt must be a string, a mapping of arguments or a function of the "
            f"pipeline, got {shown(entry)}"
        )
    given = {"prompt": entry} if isinstance(entry, str) else dict(entry)

    def draw(pipe: Any) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        arguments = {"num_inference_steps": steps, "generator": generator, **options, **given}
        return pipe(**arguments)

    return draw


def pictures_of(output: Any) -> list[torch.Tensor]:
    """Return the samples of an output, float32 on the CPU.

    Raises:
        TypeError: the output holds none.
    """
    for name in _FIELDS:
        if hasattr(output, name):
            return pictures_of(getattr(output, name))
    if isinstance(output, torch.Tensor):
        return [*output.detach().float().cpu()]
    if isinstance(output, np.ndarray):
        return [*torch.from_numpy(np.ascontiguousarray(output)).float()]
    if isinstance(output, Sequence) and not isinstance(output, str) and len(output):
        if hasattr(output[0], "convert"):  # Pillow
            return [torch.from_numpy(np.asarray(each, dtype=np.float32) / 255) for each in output]
        return [picture for each in output for picture in _one(each)]
    raise TypeError(
        f"tuning: a call must return pictures, got {shown(output)}; give functions of the pipeline "
        f"that return tensors, arrays or Pillow images"
    )


def _one(value: Any) -> list[torch.Tensor]:
    """Return one sample of a list: a tensor, or the frames of a video as one."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return [torch.as_tensor(value).detach().float().cpu()]
    return [torch.stack(pictures_of(value))]


def psnr(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Return 10 log10(range^2 / MSE) in dB; inf where both are equal.

    The range is 1 where the reference lies in [0, 1], else its largest value minus its smallest.
    """
    low, high = reference.min().item(), reference.max().item()
    width = 1.0 if low >= 0 and high <= 1 else high - low
    error = (picture.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(width**2 / error)


def similarity(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the SSIM of pictures in [0, 1], nan for what is no picture.

    Shapes are (H, W), (H, W, C), (C, H, W), or with frames in front, whose mean is taken.
    """
    if reference.ndim == 4:
        pairs = zip(picture, reference, strict=True)
        return float(np.mean([similarity(x, y) for x, y in pairs]))
    x, y = picture, reference
    if y.ndim == 3 and y.shape[0] in (1, 3) and y.shape[-1] not in (1, 3):
        x, y = x.movedim(0, -1), y.movedim(0, -1)
    is_picture = y.ndim in (2, 3) and min(y.shape[:2]) >= WINDOW
    if not is_picture or y.min() < 0 or y.max() > 1:
        return math.nan
    return ssim(y.numpy(), x.numpy(), 1.0)
