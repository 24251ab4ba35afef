"""Splitting a model's sequences over ranks, and gathering its output: uneven lengths included.

What is split where is said by a plan in the form of diffusers' `_cp_plan`; the hooks that do it are
of diffusers' registry, so that they get along with its other hooks. diffusers' own hooks would not
do: they keep no lengths, which attention needs, and know no tensor over two streams. A sequence of
n tokens gives each of N ranks n // N of them, and one more to the first n % N.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from dbcache.parallel.mesh import Axis, all_gather_single

HIDDEN = "hidden_states"
ENCODER = "encoder_hidden_states"


@dataclass(frozen=True)
class JointSplit:
    """Plan entry: a tensor along the tokens of several streams, one after the other.

    Attributes:
        split_dim: the dimension of the tokens.
        streams: names of the streams, which an earlier entry of the plan has split.
    """

    split_dim: int
    streams: tuple[str, ...]


@dataclass(frozen=True)
class Each:
    """Plan entry for one tensor, or any number of them, that are all split alike."""

    entry: ContextParallelInput


@dataclass(frozen=True)
class JointPad:
    """Plan entry for an output of which the model cuts off as many tokens as all ranks have.

    Attributes:
        split_dim: the dimension of the tokens.
        streams: names of the two streams that may be in it, the one that is cut off first.
    """

    split_dim: int
    streams: tuple[str, str]


def part_sizes(length: int, ranks: int) -> list[int]:
    """Return how many of `length` tokens each rank has."""
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]


class Shards:
    """How the sequences of one model lie on the ranks; knows the lengths of the current forward.

    Args:
        axis: the ranks that share a sequence.
        uneven: whether lengths may be split unevenly.
        filled: streams of which each rank needs a token.
        who: the model's name, for errors.
    """

    def __init__(
        self, axis: Axis, *, uneven: bool, filled: Sequence[str] = (HIDDEN,), who: str
    ) -> None:
        self.axis = axis
        self.uneven = uneven
        self.filled = filled
        self.who = who
        self.lengths: dict[str, int] = {}

    def split(self, x: torch.Tensor, dim: int, name: str) -> torch.Tensor:
        """Return this rank's part of `x`.

        Raises:
            ValueError: the ranks do not divide the length and `uneven` is off.
        """
        length, ranks = x.shape[dim], self.axis.size
        if length % ranks and not self.uneven:
            raise ValueError(
                f"{self.who}: the length of {name} must be divisible by the {ranks} ranks that "
                f"share it, got {length}; set experimental_ulysses_anything=True in parallel_kwargs"
            )
        if length < ranks and name in self.filled:
            raise ValueError(
                f"{self.who}: {name} must have a token for each of the {ranks} ranks that share "
                f"it, got {length}; use fewer ranks"
            )
        self.lengths[name] = length
        return x.tensor_split(ranks, dim)[self.axis.rank]

    def split_entry(self, x: torch.Tensor, entry: ContextParallelInput, name: str) -> torch.Tensor:
        """Return this rank's part of `x`, or `x` where the entry is for another number of dims."""
        if entry.expected_dims not in (None, x.ndim):
            return x
        return self.split(x, entry.split_dim, name)

    def split_joint(self, x: torch.Tensor, entry: JointSplit, name: str) -> torch.Tensor:
        """Return this rank's part of each stream of `x`, one after the other."""
        lengths = [self._length(stream) for stream in entry.streams]
        if x.shape[entry.split_dim] != sum(lengths):
            raise ValueError(
                f"{self.who}: {name} must be as long as {' and '.join(entry.streams)}, "
                f"{sum(lengths)}, got {x.shape[entry.split_dim]}"
            )
        parts = x.split(lengths, entry.split_dim)
        own = [part.tensor_split(self.axis.size, entry.split_dim) for part in parts]
        return torch.cat([part[self.axis.rank] for part in own], entry.split_dim)

    def pad_joint(self, x: torch.Tensor, entry: JointPad) -> torch.Tensor:
        """Return `x` with as many tokens of the first stream as all ranks have of it."""
        rank, dim = self.axis.rank, entry.split_dim
        if x.shape[dim] != self.sizes(entry.streams)[rank]:
            return x
        missing = self._length(entry.streams[0]) - self.sizes(entry.streams[:1])[rank]
        shape = list(x.shape)
        shape[dim] = missing
        return torch.cat((x.new_zeros(shape), x), dim)

    def _length(self, stream: str) -> int:
        if stream not in self.lengths:
            raise RuntimeError(
                f"{self.who}: the plan must split {stream} before what depends on it, got no "
                f"length of it; put its entry first"
            )
        return self.lengths[stream]

    def sizes(self, streams: Sequence[str]) -> list[int]:
        """Return how many tokens of some streams together each rank has."""
        parts = [part_sizes(self._length(stream), self.axis.size) for stream in streams]
        return [sum(part) for part in zip(*parts, strict=True)]

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the whole of the latent sequence, of which `x` is this rank's part."""
        sizes = self.sizes((HIDDEN,))
        if x.shape[dim] != sizes[self.axis.rank]:
            raise ValueError(
                f"{self.who}: what is gathered must have this rank's {sizes[self.axis.rank]} of "
                f"{sum(sizes)} tokens, got {x.shape[dim]}; check the plan's output entry"
            )
        return all_gather(x, dim, sizes, self.axis)


def all_gather(x: torch.Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> torch.Tensor:
    """Return the parts of all ranks along `dim`; `sizes` says how long each is."""
    x = x.detach().movedim(dim, 0).contiguous()
    longest = max(sizes)
    if len(x) < longest:
        x = torch.cat((x, x.new_zeros((longest - len(x), *x.shape[1:]))))
    out = x.new_empty((axis.size * longest, *x.shape[1:]))
    all_gather_single(out, x, axis.group)
    if min(sizes) < longest:
        parts = out.split(longest)
        out = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return out.movedim(0, dim).contiguous()


class SplitHook(ModelHook):
    """Splits inputs of a module before its forward, and outputs after it."""

    def __init__(self, entries: Mapping[str | int, Any], shards: Shards) -> None:
        super().__init__()
        self.entries = entries
        self.shards = shards
        self.names: list[str] = []

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        module_class: Any = type(getattr(module, "_orig_mod", module))  # torch.compile's wrapper
        self.names = list(inspect.signature(module_class.forward).parameters)[1:]
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        positional = list(args)
        for name, entry in self.entries.items():
            if not isinstance(name, str):
                continue
            index = self.names.index(name) if name in self.names else len(positional)
            if name in kwargs:
                kwargs[name] = self._split(kwargs[name], entry, name)
            elif index < len(positional):
                positional[index] = self._split(positional[index], entry, name)
        return tuple(positional), kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        entries = {index: e for index, e in self.entries.items() if isinstance(index, int)}
        if not entries:
            return output
        if isinstance(output, torch.Tensor):
            return self._split(output, entries[0], f"output of {type(module).__name__}")
        output = list(output)
        for index, entry in entries.items():
            name = f"output {index} of {type(module).__name__}"
            output[index] = self._split(output[index], entry, name)
        return tuple(output)

    def _split(self, x: Any, entry: Any, name: str) -> Any:
        if x is None:
            return None
        if isinstance(entry, Each):
            if isinstance(x, (list, tuple)):
                return type(x)(self._split(one, entry.entry, name) for one in x)
            entry = entry.entry
        if isinstance(entry, (list, tuple)):
            return type(x)(self._split(one, e, name) for one, e in zip(x, entry, strict=True))
        if isinstance(entry, JointSplit):
            return self.shards.split_joint(x, entry, name)
        if isinstance(entry, JointPad):
            return self.shards.pad_joint(x, entry)
        return self.shards.split_entry(x, entry, name)


class GatherHook(ModelHook):
    """Gathers the output of a module."""

    def __init__(self, entries: Sequence[Any], shards: Shards) -> None:
        super().__init__()
        self.entries = entries
        self.shards = shards

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        is_tensor = isinstance(output, torch.Tensor)
        outputs = [output] if is_tensor else list(output)
        for index, entry in enumerate(self.entries):
            if entry is not None:
                outputs[index] = self.shards.gather(outputs[index], entry.gather_dim)
        return outputs[0] if is_tensor else tuple(outputs)


Plan = Mapping[str, Any]


def check_plan(module: torch.nn.Module, plan: Plan, who: str) -> list[tuple[torch.nn.Module, str]]:
    """Return the modules of each entry of a plan, with the entry's pattern.

    Raises:
        ValueError: a pattern that is not in the model, or an entry of another form.
    """
    found = []
    for pattern, entry in plan.items():
        is_output = isinstance(entry, ContextParallelOutput) or (
            isinstance(entry, (list, tuple))
            and all(e is None or isinstance(e, ContextParallelOutput) for e in entry)
        )
        if not is_output and not isinstance(entry, Mapping):
            raise ValueError(
                f"{who}: an entry of cp_plan must be a dict of ContextParallelInput or a "
                f"ContextParallelOutput, got {entry!r} for {pattern!r}"
            )
        matches = matching(module, pattern)
        if not matches:
            raise ValueError(f"{who}: cp_plan must name modules of the model, got {pattern!r}")
        found += [(match, pattern) for match in matches]
    return found


def matching(module: torch.nn.Module, pattern: str) -> list[torch.nn.Module]:
    """Return the submodules of a pattern, in which ``*`` stands for the items of a list."""
    modules = [module]
    for atom in pattern.split(".") if pattern else ():
        if atom == "*":
            modules = [child for parent in modules for child in parent.children()]
        else:
            children = [getattr(parent, atom, None) for parent in modules]
            modules = [child for child in children if isinstance(child, torch.nn.Module)]
    return modules


class PlanHooks:
    """The hooks of a plan on one model, installed and removed without trace."""

    def __init__(self, module: torch.nn.Module, plan: Plan, shards: Shards) -> None:
        self.plan = plan
        self.shards = shards
        self.targets = check_plan(module, plan, shards.who)
        self._installed: list[tuple[torch.nn.Module, str, bool, bool]] = []

    def install(self) -> None:
        """Register the hooks, one per module and kind: entries of a module take effect in order."""
        inputs: dict[torch.nn.Module, dict[str | int, Any]] = {}
        for target, pattern in self.targets:
            entry = self.plan[pattern]
            if isinstance(entry, Mapping):
                inputs.setdefault(target, {}).update(entry)
            else:
                entries = [entry] if isinstance(entry, ContextParallelOutput) else list(entry)
                self._register(target, GatherHook(entries, self.shards), "gather")
        for target, merged in inputs.items():
            self._register(target, SplitHook(merged, self.shards), "split")

    def _register(self, target: torch.nn.Module, hook: ModelHook, kind: str) -> None:
        own = target.__dict__
        name = f"dbcache_{kind}"
        self._installed.append((target, name, "forward" in own, "_diffusers_hook" in own))
        HookRegistry.check_if_exists_or_initialize(target).register_hook(hook, name)

    def remove(self) -> None:
        """Take the hooks away, and what was only there for them."""
        for target, name, had_forward, had_registry in reversed(self._installed):
            registry = target.__dict__["_diffusers_hook"]
            registry.remove_hook(name, recurse=False)
            if registry.hooks:
                continue
            if not had_forward:
                del target.__dict__["forward"]
            if not had_registry:
                del target.__dict__["_diffusers_hook"]
        self._installed = []


def input_entry(plan: Plan, path: str, name: str = HIDDEN) -> ContextParallelInput | None:
    """Return how a plan splits the input `name` on its way into the module `path`, if it does."""
    entry = plan.get(path)
    found = entry.get(name) if isinstance(entry, Mapping) else None
    return found if isinstance(found, ContextParallelInput) else None
