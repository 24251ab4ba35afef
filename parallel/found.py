"""Which ranks a transformer's forward waits for, where others than dbcache have spread it.

    diffusers' context parallel     the mesh of `enable_parallelism`, on which tokens are split
    DTensors                        axes of their meshes along which a parameter is split: tensor
                                    parallel, FSDP2 (`fully_shard`), diffusers' `tp_degree`
    FSDP1                           the process group of each wrapped module

Ranks that run other blocks than each other would wait for ever in a message of a block that the
others skip.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    is_ready = dist.is_available() and dist.is_initialized()
    return is_ready and dist.group.WORLD is not None and dist.get_world_size() > 1


def found_groups(module: torch.nn.Module) -> dict[str, list[Any]]:
    """Return the process groups that a forward of the module waits for, by how it is spread."""
    by_how: dict[str, list[Any]] = {}
    for how, groups in (
        ("diffusers' context parallel", _of_context_parallel(module)),
        ("DTensor parameters", _of_parameters(module)),
        ("FSDP1", _of_wrapped(module)),
    ):
        if found := list(groups):
            by_how[how] = found
    return by_how


def is_spread_otherwise(module: torch.nn.Module) -> bool:
    """Whether a module says that ranks share it, but not which: ParaAttention, cache-dit, xDiT."""
    classes = type(module).__mro__
    return bool(getattr(module, "_is_parallelized", False)) or any(
        cls.__module__.partition(".")[0] == "xfuser" for cls in classes
    )


def context_parallel(module: torch.nn.Module) -> Any:
    """Return the `ContextParallelConfig` that diffusers put on the module, None without."""
    config = getattr(module, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None)


def _of_context_parallel(module: torch.nn.Module) -> Iterator[Any]:
    config = context_parallel(module)
    if config is not None:
        yield config._flattened_mesh.get_group()


def _of_parameters(module: torch.nn.Module) -> Iterator[Any]:
    tensors = sys.modules.get("torch.distributed.tensor")  # who has DTensors has imported it
    if tensors is None:
        return
    seen = set()
    for parameter in module.parameters():
        if not isinstance(parameter, tensors.DTensor):
            continue
        mesh = parameter.device_mesh
        for axis, placement in enumerate(parameter.placements):
            if not placement.is_replicate() and (mesh, axis) not in seen:
                seen.add((mesh, axis))
                yield mesh.get_group(axis)


def _of_wrapped(module: torch.nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for part in module.modules():
            if isinstance(part, fsdp.FullyShardedDataParallel):
                yield part.process_group


def split_by_hook(module: torch.nn.Module, path: str, x: torch.Tensor, name: str) -> torch.Tensor:
    """Return this rank's part of the input `name` of the block `path`, if diffusers splits it."""
    block: Any = module
    for part in path.split("."):
        block = block._modules[part]  # proxies lie over the attributes
    registry = getattr(block, "_diffusers_hook", None)
    for hook_name, hook in () if registry is None else registry.hooks.items():
        if hook_name.startswith("cp_input---"):
            entry = hook.metadata.get(name)
            if entry is not None and not entry.split_output:
                return hook._prepare_cp_input(x, entry)
    return x
