"""Ranks that take one decision: a vote per step, and equal settings, whoever spread the model.

    slots[own place] = sums                      of the ranks, zeros elsewhere
    all_reduce(slots, group)                     along each axis in turn
    change = slots.sum over the ranks

Adding zeros is exact, so that all ranks add the same numbers in the same order, whatever the order
in which a group's ranks are added up: the bits of the decision are the same on all of them.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dbcache.config.options import shown
from dbcache.config.parallelism import ParallelismConfig
from dbcache.parallel.found import (
    context_parallel,
    found_groups,
    is_distributed,
    is_spread_otherwise,
    split_by_hook,
)
from dbcache.parallel.mesh import check_world, make_mesh

LOGGER = logging.getLogger("dbcache")

FAILED = "failed"
"""Key of a rank's error among its facts."""


class Ranks:
    """The ranks along some axes of a mesh, given as this rank's process group of each axis.

    Args:
        groups: in any order; those that lie within another one are left out.

    Attributes:
        members: their global ranks, sorted; known after the first `compare`.
    """

    def __init__(self, groups: Iterable[Any] = ()) -> None:
        self.groups: list[Any] = []
        self.members: list[int] = []
        self._sets: list[frozenset[int]] = []
        self.add(groups)

    def add(self, groups: Iterable[Any]) -> bool:
        """Take up further groups; return whether these are more ranks than before."""
        grown = False
        for group in groups:
            ranks = frozenset(dist.get_process_group_ranks(group))
            if len(ranks) == 1 or any(ranks <= known for known in self._sets):
                continue
            pairs = [*zip(self._sets, self.groups, strict=True), (ranks, group)]
            kept = [pair for pair in pairs if pair[0] is ranks or not pair[0] <= ranks]
            kept.sort(key=lambda pair: _stride(pair[0]))  # all ranks ask axis after axis
            self._sets, self.groups = map(list, zip(*kept, strict=True))
            self.members, grown = [], True
        return grown

    def __bool__(self) -> bool:
        return bool(self.groups)

    def gather(self, value: Any) -> dict[int, Any]:
        """Return the values of all ranks, by global rank."""
        found = {dist.get_rank(): value}
        for group in self.groups:
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = {rank: one for part in parts for rank, one in part.items()}
        return found

    def compare(self, who: str, facts: Mapping[str, str]) -> None:
        """Raise on all ranks if one of them has other facts, or has failed.

        Raises:
            ValueError: the error names what differs on which rank. RuntimeError: a rank failed.
        """
        found = self.gather(dict(facts))
        error = self._difference(who, found)
        errors = self.gather(None if error is None else str(error))
        told = next((text for text in errors.values() if text), None)
        if error is None and told is not None:  # where the groups are no mesh, not all see it
            error = ValueError(told)
        if error is not None:
            raise error
        self.members = sorted(found)

    def _difference(self, who: str, found: Mapping[int, Mapping[str, str]]) -> Exception | None:
        for rank in sorted(found):
            if FAILED in found[rank]:
                return RuntimeError(
                    f"{who}: all ranks that decide together must succeed, but rank {rank} got "
                    f"{found[rank][FAILED]}"
                )
        sizes = [len(ranks) for ranks in self._sets]
        if len(found) != prod(sizes):
            axes = ", ".join(str(sorted(ranks)) for ranks in self._sets)
            return ValueError(
                f"{who}: the groups must be axes of one mesh of ranks, got {axes} on rank "
                f"{dist.get_rank()}, through which {len(found)} ranks are reached in place of "
                f"{prod(sizes)}; pass this rank's group of each axis, on all ranks"
            )
        names = {name: None for facts in found.values() for name in facts}
        differing = [
            f"{name} is {text}" for name in names if (text := _by_rank(name, found)) is not None
        ]
        if not differing:
            return None
        return ValueError(
            f"{who}: all ranks that decide together must have the same settings, but "
            f"{'; '.join(differing)}; call it alike on all ranks"
        )

    def check_equal(self, who: str, facts: Mapping[str, str], device: torch.device) -> None:
        """Do what `compare` does, by a message of 8 bytes per rank as long as all is equal.

        Args:
            device: where such a message can be sent from.
        """
        if not self.members:
            self.compare(who, facts)
            return
        text = repr(sorted(facts.items())).encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        digests = self.exchange(torch.tensor(digest, dtype=torch.int64, device=device))
        if len(set(digests.tolist())) > 1:
            self.compare(who, facts)

    def exchange(self, own: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, (ranks, ...), in the order of `members`."""
        slots = own.new_zeros((len(self.members), *own.shape))
        slots[self.members.index(dist.get_rank())] = own
        for group in self.groups:
            dist.all_reduce(slots, group=group)
        return slots


def _stride(ranks: frozenset[int]) -> tuple[int, int]:
    """Return what is the same for all groups along one axis of a mesh: stride and size."""
    first, second = sorted(ranks)[:2]
    return second - first, len(ranks)


def _by_rank(name: str, found: Mapping[int, Mapping[str, str]]) -> str | None:
    """Return which ranks have which value of a fact; None where all have the same."""
    ranks: dict[str, list[int]] = {}
    for rank in sorted(found):
        ranks.setdefault(found[rank].get(name, "not there"), []).append(rank)
    if len(ranks) == 1:
        return None
    parts = [
        f"{value if len(value) < 100 else shown(value)} on rank{'s' * (len(own) > 1)} "
        f"{', '.join(map(str, own))}"
        for value, own in ranks.items()
    ]
    return " and ".join(parts)


def named_groups(who: str, given: Any) -> list[Any]:
    """Return the process groups that a user names: groups, meshes (all their axes), or several.

    None among several is left out.

    Raises:
        TypeError: something else. ValueError: a group without this rank. RuntimeError:
            `torch.distributed` is not initialised.
    """
    if given is None:
        return []
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{who}: torch.distributed must be initialised, got a single process; start with "
            f"torchrun and call torch.distributed.init_process_group() first"
        )
    several = isinstance(given, Sequence) and not isinstance(given, str)
    groups: list[Any] = []
    for one in given if several else (given,):
        if isinstance(one, DeviceMesh):
            groups += one.get_all_groups()
        elif one is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"{who}: this rank, {dist.get_rank()}, must be in each group, got one without it; "
                f"pass the group along each axis that this rank is in"
            )
        elif isinstance(one, dist.ProcessGroup):
            groups.append(one)
        elif one is not None or not several:
            raise TypeError(
                f"{who}: must be process groups or device meshes of torch.distributed, got "
                f"{shown(one)}"
            )
    return groups


def groups_of(config: ParallelismConfig) -> list[Any]:
    """Return the groups of the ranks that must enable alike: all, or those of a replica.

    The first call with `dp_size` above 1 is a message among all ranks.
    """
    try:
        replicas = check_world(config)["dp"]
    except ValueError:
        return [dist.group.WORLD]  # the other ranks wait there to hear of the error
    return [dist.group.WORLD] if replicas == 1 else make_mesh(config).groups


class Agreement:
    """What ranks do before they change anything: see that none fails, and all want the same.

        with Agreement("enable", ranks) as agree:
            agree(settings)                  # may be called several times

    Where the body raises on one rank, the others raise at their next `agree`.

    Args:
        who: for errors.
        ranks: those that decide together; none: nothing is asked.
    """

    def __init__(self, who: str, ranks: Ranks) -> None:
        self.who = who
        self.ranks = ranks
        self._is_over = False

    def __call__(self, facts: Mapping[str, str]) -> None:
        """Raise on all ranks if one has other facts, or has failed; see `Ranks.compare`."""
        if self.ranks:
            self._is_over = True
            self.ranks.compare(self.who, facts)
            self._is_over = False

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and self.ranks and not self._is_over:
            with suppress(ValueError, RuntimeError):  # this rank's own error is what it raises
                self.ranks.compare(self.who, {FAILED: f"{type(error).__name__}: {error}"})


class Together:
    """A transformer whose decisions several ranks take together, and which is left as it is.

    Args:
        module: the transformer.
        groups: process groups that the user names. Those that are found on the module (`found.py`)
            are taken up when a request begins, and stay.
    """

    spreads = False
    splits_guidance = False
    sees_whole = False

    def __init__(self, module: torch.nn.Module, groups: Sequence[Any] = ()) -> None:
        self.module = module
        self.who = type(module).__name__
        self.ranks = Ranks(groups)
        self._is_split = False
        self._has_warned = False

    def of(self, module: torch.nn.Module) -> Together:
        """Return the same for another transformer."""
        return Together(module, self.ranks.groups)

    def look(self) -> Ranks:
        """Return the ranks that decide together now."""
        if is_distributed():
            self._is_split = context_parallel(self.module) is not None
            for how, groups in found_groups(self.module).items():
                if self.ranks.add(groups):
                    LOGGER.info("%s: ranks decide together, found %s", self.who, how)
            if not self.ranks and is_spread_otherwise(self.module):
                self._warn()
        return self.ranks

    def _warn(self) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        text = (
            f"{self.who}: is spread over ranks in a way that dbcache does not know, so that each "
            f"rank decides for itself, and ranks that differ wait for each other; pass their "
            f"process groups as decide_together"
        )
        LOGGER.warning("%s", text)
        warnings.warn(text, stacklevel=2)

    def meet(self, facts: Callable[[], Mapping[str, str]], device: torch.device) -> None:
        """See which ranks there are as a request begins, and that all begin it alike.

        Args:
            facts: returns what must be the same on all of them.
            device: of the latents.

        Raises:
            ValueError: it is not.
        """
        if self.look():
            self.ranks.check_equal(self.who, facts(), device)

    @property
    def votes(self) -> bool:
        """Whether a decision takes a message."""
        return bool(self.ranks)

    def install(self) -> None:
        """Do nothing: the module is as others have spread it."""

    def remove(self) -> None:
        """Do nothing."""

    def new_request(self) -> None:
        """Return nothing: each rank runs the calls that it is given."""

    def split_input(self, path: str, x: torch.Tensor, name: str = "hidden_states") -> torch.Tensor:
        """Return this rank's part of what goes into the module `path`, if diffusers splits it."""
        return split_by_hook(self.module, path, x, name) if self._is_split else x

    def vote(self, partials: torch.Tensor, *, per_sample: bool) -> torch.Tensor:
        """Return the sums of a step's change over all ranks.

        One message per axis: 8 bytes per rank, or that per sample; twice that where important
        tokens are told apart. A NaN on one rank is a NaN on all.

        Args:
            partials: what `probe_diff` gives, float32 (B, T, 2 or 4).
            per_sample: keep the samples apart; samples of one place in their batches count as one.
        """
        sums = self.ranks.exchange(partials.sum(1 if per_sample else (0, 1))).sum(0)
        return sums[:, None] if per_sample else sums[None, None]
