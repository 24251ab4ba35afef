"""The ranks of a run as a mesh, and the process groups along its axes.

Rank r has the coordinates of r in a row-major array of `AXES`' sizes, so that the ranks of a tensor
parallel group, which talk most, are neighbours (on one node), then those of a Ulysses group.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from dbcache.config.parallelism import AXES, ParallelismConfig


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh, seen from this rank.

    Attributes:
        group: the process group of the ranks along it; None where there is only this one.
        size: how many they are.
        rank: this rank's place among them.
        ranks: their global ranks.
    """

    group: Any = None
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mesh:
    """The axes of this rank. `sequence` is ring and Ulysses together, ring the slower one."""

    ring: Axis
    ulysses: Axis
    sequence: Axis
    tp: Axis
    cfg: Axis

    @property
    def groups(self) -> list[Any]:
        """The groups of all ranks that work on one request, an axis each."""
        axes = (self.sequence, self.tp, self.cfg)
        return [axis.group for axis in axes if axis.group is not None]


def check_world(config: ParallelismConfig) -> dict[str, int]:
    """Return the sizes of the axes in this run, without any communication.

    Raises:
        RuntimeError: `torch.distributed` is not available, or not initialised.
        ValueError: the sizes do not multiply to the number of ranks.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "ParallelismConfig: torch.distributed must be initialised, got a single process; start "
            "with torchrun and call torch.distributed.init_process_group() first"
        )
    return config.sizes(dist.get_world_size())


def make_mesh(config: ParallelismConfig) -> Mesh:
    """Return the mesh of `config`; all ranks of the run must call this alike.

    Groups are made once per shape and timeout and kept with the default group: they are a resource
    of the process, and making them anew for each `enable` would leak them.
    """
    sizes = check_world(config)
    world = dist.group.WORLD
    known = _MESHES.setdefault(world, {})
    key = (*sizes.values(), config.timeout)
    if key not in known:
        timeout = timedelta(seconds=config.timeout)
        axes = {
            name: _make_axis(sizes, along, timeout)
            for name, along in (
                ("ring", ("ring",)),
                ("ulysses", ("ulysses",)),
                ("sequence", ("ring", "ulysses")),
                ("tp", ("tp",)),
                ("cfg", ("cfg",)),
            )
        }
        known[key] = Mesh(**axes)
    return known[key]


_MESHES: weakref.WeakKeyDictionary[Any, dict[tuple[float, ...], Mesh]] = weakref.WeakKeyDictionary()


def replica_size(config: ParallelismConfig) -> int:
    """Return how many ranks work on one request."""
    return dist.get_world_size() // check_world(config)["dp"]


def replica_axis(config: ParallelismConfig) -> Axis:
    """Return all ranks that work on one request, in one group; all ranks must call this alike."""
    world, sizes = dist.group.WORLD, check_world(config)
    known = _REPLICAS.setdefault(world, {})
    key = (sizes["dp"], config.timeout)
    if key not in known:
        along = [name for name in AXES if name != "dp"]
        known[key] = _make_axis(sizes, along, timedelta(seconds=config.timeout))
    return known[key]


_REPLICAS: weakref.WeakKeyDictionary[Any, dict[tuple[float, ...], Axis]] = (
    weakref.WeakKeyDictionary()
)


def _make_axis(sizes: dict[str, int], along: Sequence[str], timeout: timedelta) -> Axis:
    """Make the groups along some axes, and return that of this rank."""
    rank = dist.get_rank()
    subgroups = list(_subgroups(sizes, along))
    own = next(ranks for ranks in subgroups if rank in ranks)
    if len(own) == 1:
        return Axis(ranks=tuple(own))
    group, _ = dist.new_subgroups_by_enumeration(subgroups, timeout=timeout)
    return Axis(group, len(own), own.index(rank), tuple(own))


def _subgroups(sizes: dict[str, int], along: Sequence[str]) -> Iterator[list[int]]:
    """Yield the global ranks of each group along some axes, in order."""
    others = [axis for axis in AXES if axis not in along]
    for fixed in product(*(range(sizes[axis]) for axis in others)):
        ranks = []
        for moving in product(*(range(sizes[axis]) for axis in along)):
            place = dict(zip((*others, *along), (*fixed, *moving), strict=True))
            rank = 0
            for axis in AXES:
                rank = rank * sizes[axis] + place[axis]
            ranks.append(rank)
        yield ranks


def all_gather_single(out: torch.Tensor, x: torch.Tensor, group: Any) -> None:
    """Gather `x` of all ranks of a group in `out`, one after the other."""
    # PyTorch 2.13 gave it this name and deprecates the other
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x, group=group)


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device that a module's parameters are on."""
    return next(module.parameters()).device
