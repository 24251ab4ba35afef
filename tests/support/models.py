"""Tiny real models of all transformer classes in the table, and their denoising loops.

Weights and inputs follow from seeds; float32 on the CPU, about ten blocks.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import models_audio
import models_flux
import models_image
import models_joint
import models_other
import models_streaming
import models_variants
import models_video
import tiny
import torch
from model_case import STREAMS, find_class

PARTS = (
    models_flux,
    models_image,
    models_video,
    models_joint,
    models_streaming,
    models_audio,
    models_other,
)
CASES = {name: case for part in PARTS for name, case in part.CASES.items()}
"""By the name of the class."""

VARIANTS = models_variants.CASES
ALL = CASES | VARIANTS


@cache
def model(name: str) -> torch.nn.Module:
    """Return the tiny model of a class; the same one each time."""
    case, cls = ALL[name], find_class(name)
    if case.build is not None:
        return case.build()
    return tiny.fill(cls(**case.config), seed=3)


def stacks_of(name: str, transformer: Any = None) -> list[list[torch.nn.Module]]:
    """Return the blocks of each stack, of `model(name)` or another transformer of the class."""
    transformer = transformer or model(name)
    stacks = [[_list(transformer, path) for path in paths] for paths in ALL[name].stacks]
    return [[block for blocks in lists for block in blocks] for lists in stacks]


def _list(transformer: torch.nn.Module, path: str) -> list[torch.nn.Module]:
    """Return the blocks of ``"list"``, ``"list[:-2]"``, ``"list[-2:]"`` or ``"list & list"``."""
    if "&" in path:
        lists = [_list(transformer, each.strip()) for each in path.split("&")]
        return [block for turn in zip(*lists, strict=True) for block in turn]
    whole, _, part = path.partition("[")
    bounds = [int(n) if n else None for n in part.strip("]").split(":")]
    return [*transformer.get_submodule(whole)][slice(*bounds)]


def middles_of(name: str, fn: int, bn: int, transformer: Any = None) -> list[range]:
    """Return which blocks of each stack are the middle ones.

    Of lists that take turns Fn and Bn are rounds, and the last round of the middle has its first
    block only.
    """
    ranges = []
    for paths, blocks in zip(ALL[name].stacks, stacks_of(name, transformer), strict=True):
        turns = paths[0].count("&") + 1
        ranges.append(range(turns * fn, len(blocks) - turns * (bn + 1) + 1))
    return ranges


def streams_of(name: str) -> list[tuple[str, ...]]:
    """Return the names of the streams' parameters for each stack."""
    case = ALL[name]
    return [case.streams.get(paths[0], STREAMS) for paths in case.stacks]


def run(
    name: str,
    steps: int,
    seeds: list[int] | None = None,
    more: Callable[[int], dict[str, Any]] = lambda step: {},
) -> list[torch.Tensor]:
    """Return the outputs of `steps` steps on inputs that follow from `seeds`, one per step.

    Without seeds the loop is closed: a part of each output goes into the next input. Where a model
    returns several tensors an output is all of them, one after the other. `more` returns further
    arguments of a step.
    """
    case, transformer = ALL[name], model(name)
    x, outputs = tiny.noise(*case.latent, seed=5), []
    for step in range(steps):
        if seeds is not None:
            x = tiny.noise(*case.latent, seed=seeds[step])
        time = torch.full((len(x),), case.start * (1 - (0 if seeds else step / steps)))
        with torch.no_grad():
            tensors = _tensors(transformer(**case.call_arguments(x, time), **more(step)))
        outputs.append(torch.cat([tensor.flatten() for tensor in tensors]))
        x = x - _like(x, tensors[0]) / steps
    return outputs


def _tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors in what a model returned, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values if value is not None for tensor in _tensors(value)]


def _like(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return the part of `output` that has the shape of `x`."""
    if output.numel() == x.numel():
        return output.reshape(x.shape)
    return output[tuple(slice(0, n) for n in x.shape)]
