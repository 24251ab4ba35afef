"""One picture drawn with all steps in full, and what is kept of it to tune with.

Of each call of a transformer: what it was given, what it returned, and what all blocks of each
stack added. Of the scheduler: itself before the first step, and what each step was given.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import dbcache
from dbcache.adapters.signals.measurements import first_tensor
from dbcache.config.calibration import OPEN
from dbcache.targets import enabled
from dbcache.tuning.progress import quietly

LARGEST_CODE = 448.0
"""Of e4m3."""


@dataclass
class Call:
    """One forward of a transformer.

    Attributes:
        args, kwargs: what it was given; tensors that did not change are shared between calls.
        output: the prediction that it returned.
        scheduler_step: steps that the scheduler had made.
        residuals: per stack what its blocks added, to hidden and to encoder states, as stored.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    scheduler_step: int
    residuals: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass
class SchedulerStep:
    """One step of the scheduler: the model's output as it was given, and the rest."""

    output: torch.Tensor
    timestep: Any
    sample_dims: int
    kwargs: dict[str, Any]


@dataclass
class Recorded:
    """One picture.

    Attributes:
        calls: by (transformer, branch), in order.
        scheduler: a copy from before the first step; None where there is none to be seen.
        steps: what it was given.
        final: the latents that it returned last.
        output: what the draw returned.
        nbytes: of the residuals.
    """

    calls: dict[tuple[int, str | None], list[Call]] = field(default_factory=dict)
    scheduler: Any = None
    steps: list[SchedulerStep] = field(default_factory=list)
    final: torch.Tensor | None = None
    output: Any = None
    nbytes: int = 0


class Store:
    """Keeps residuals on the device, on the CPU, or on the CPU in fp8 with a scale per token.

    Args:
        where: "device", "cpu", "fp8", or "auto": the first of these that has room.
        say: is told once how much it will be.
    """

    def __init__(self, where: str, say: Callable[[str], None]) -> None:
        self.where = where
        self._say = say
        self._is_chosen = False

    def choose(self, one: int, calls: int | None, device: torch.device) -> None:
        """Choose where residuals of `one` bytes per call go, before they are made."""
        if self._is_chosen:
            return
        self._is_chosen = True
        total = one * (calls or 50)
        if self.where == "auto":
            self.where = "device" if total < 0.5 * _free(device) else "cpu"
            if self.where == "cpu" and total > 0.5 * _free(torch.device("cpu")):
                self.where = "fp8"
        kept = {"device": f"on {device}", "cpu": "on the CPU", "fp8": "on the CPU in fp8"}
        self._say(
            f"residuals of one picture: {total / 1e6:,.0f} MB ({calls or 'about 50'} calls of "
            f"{one / 1e6:,.1f} MB), kept {kept[self.where]}, one picture at a time"
        )

    def put(self, x: torch.Tensor | None) -> Any:
        """Return `x` as it is kept."""
        if x is None:
            return None
        if self.where == "device":
            return x.clone()
        if self.where == "cpu":
            return x.to("cpu", copy=True)
        scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST_CODE
        codes = (x.float() / scale).to(torch.float8_e4m3fn)
        return codes.cpu(), scale.cpu()

    @staticmethod
    def get(kept: Any, target: torch.Tensor) -> None:
        """Write what was kept into `target`."""
        if isinstance(kept, tuple):
            codes, scale = (part.to(target.device) for part in kept)
            kept = codes.float() * scale
        target.copy_(kept)


def _free(device: torch.device) -> float:
    """Return the bytes that are free, as far as it can be known."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return 8e9


class _Watcher:
    """Notes the full steps of one transformer's stacks; a recorder, as `BlockStack` has them."""

    def __init__(self, index: int, handle: Any, recorded: Recorded, store: Store) -> None:
        self.index, self.recorded, self.store = index, recorded, store
        self.first = handle.setup.stacks[0]
        self.clock: Callable[[], int | None] = lambda: None
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._memo: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the transformer is called with."""
        self.given = tuple(map(self._kept, args)), {k: self._kept(v) for k, v in kwargs.items()}

    def _kept(self, value: Any) -> Any:
        """Return a value that stays: a copy of a tensor, the same one while it does not change."""
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [self._kept(each) for each in value]
        if not isinstance(value, torch.Tensor):
            return value
        key = id(value), 0 if value.is_inference() else value._version
        if key not in self._memo:
            self._memo[key] = value, value.clone()
        return self._memo[key][1]

    def on_blocks(self, step: Any, h_out: torch.Tensor) -> None:
        """Do nothing: the lane stores what the blocks add."""

    def on_output(self, step: Any, output: Any) -> None:
        """Keep what the transformer returned, and what the blocks of the step's stack added."""
        history = step.lane.history
        if history.snapshots is None:
            return
        calls = self.recorded.calls.setdefault((self.index, step.branch), [])
        if step.stack is self.first:
            made = first_tensor(step.stack.name, output).clone()
            calls.append(Call(*self.given, made, len(self.recorded.steps)))
        pair = [history.snapshots[0], None]
        if history.encoder_snapshots is not None:
            pair[1] = history.encoder_snapshots[0]
        one = sum(x.nbytes for x in pair if x is not None)
        self.store.choose(one, step.run.settings.steps, pair[0].device)
        self.recorded.nbytes += one
        calls[-1].residuals.append((self.store.put(pair[0]), self.store.put(pair[1])))


@quietly()
@torch.no_grad()
def record(target: Any, draw: Callable[[Any], Any], store: Store) -> Recorded:
    """Draw one picture with all steps in full, and return what was kept of it.

    Args:
        target: a pipeline, or what `draw` takes; the cache must be off.
        draw: draws on it.
        store: where residuals go.
    """
    recorded = Recorded()
    dbcache.enable(target, policy="magcache", calibration=OPEN, max_warmup_steps=10**9)
    hooks = []
    try:
        for index, handle in enumerate(enabled(target, "tune")):
            if not handle.setup.stacks:
                raise ValueError(
                    "tune: the transformer must have blocks that are known before the first "
                    "forward, got none; name forward_pattern in the BlockAdapter"
                )
            watcher = _Watcher(index, handle, recorded, store)
            for stack in handle.setup.stacks:
                stack.recorder = watcher
            hooks.append(handle.module.register_forward_pre_hook(watcher.before, with_kwargs=True))
        with watched_scheduler(target, recorded):
            recorded.output = draw(target)
    finally:
        for hook in hooks:
            hook.remove()
        dbcache.disable(target)
    if not recorded.calls:
        raise RuntimeError("tune: a draw must call the pipeline it is given, got no call")
    return recorded


@contextmanager
def watched_scheduler(target: Any, recorded: Recorded) -> Iterator[None]:
    """Note what the scheduler of a pipeline is given, and what it returns last."""
    pipe = getattr(target, "pipe", target)
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "step"):
        yield
        return

    @functools.wraps(type(scheduler).step)  # pipelines look at what it takes
    def step(self: Any, output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not scheduler:  # a copy, as of a pipeline with a second stream
            return type(self).step(self, output, timestep, sample, *args, **kwargs)
        if not recorded.steps:
            own = scheduler.__dict__.pop("step")
            recorded.scheduler = copy.deepcopy(scheduler)
            scheduler.__dict__["step"] = own
        result = type(scheduler).step(scheduler, output, timestep, sample, *args, **kwargs)
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        recorded.steps.append(SchedulerStep(output.detach(), timestep, sample.ndim, dict(kwargs)))
        recorded.final = latents.detach()
        return result

    scheduler.__dict__["step"] = types.MethodType(step, scheduler)  # copies are bound to themselves
    try:
        yield
    finally:
        scheduler.__dict__.pop("step", None)
