"""The clock of a request: which step and which guidance branch a call of the transformer is."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dbcache.adapters.requests.guidance import ATTENTION_OPTIONS, LEAVES_OUT, Branches
from dbcache.adapters.requests.setup import Setup
from dbcache.adapters.requests.step_times import Move, StepTimes
from dbcache.adapters.signals.ip_adapter import IMAGES, ImageScales

Steps = tuple[int | None, int | None, int | None]
"""Of a request, of its scheduler at most, and of a loop that is shared; None: not known."""

_is_none = functools.partial(operator.is_, None)

MOST_CONDITIONS = 4
"""Of the first calls, which show whether branches that nobody names take turns."""


def is_capturing() -> bool:
    """Whether the current stream is captured by someone. CPU builds of PyTorch cannot tell."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Clock:
    """Counts the calls of one request, and finds their branches.

    Args:
        setup: the settings; `restart` begins with them.
        steps: of the request, where the caller knows; None: the config or a scheduler may tell.
        follows: branches are found from the calls. Without that, calls are one branch, or two in
            turn, and `num_inference_steps` calls or a time that runs back begin the request anew.

    Attributes:
        branch: of the call under way; `inputs` are the names of the arguments that it is given.
        name: what the caller named the call, None without.
        by_time: of calls that are followed the time says where steps end, not a scheduler.
        shares_steps: another transformer runs some of the steps that a pipeline tells of.
        calls: since the request began.
        planned_steps: returns the steps that a pipeline plans, those of its scheduler that fall to
            this transformer, and those of the loop whose steps it shares with others.
    """

    def __init__(self, setup: Setup, *, steps: int | None, follows: bool) -> None:
        self.follows = follows
        self.known_steps = steps
        self.planned_steps: Callable[[], Steps] | None = None
        self.shares_steps = False
        self.branch: str | None = None
        self.inputs: frozenset[str] = frozenset()
        self.name: str | None = None
        self.branches = Branches(alternates=setup.spec.separate_cfg)
        self._times = StepTimes(setup.module)
        self._image_scales = ImageScales(setup.module)
        self._looks_at_times = False
        self._step_index: int | None = None
        self.by_time = False

    def restart(self, setup: Setup) -> None:
        """Forget all steps and branches, and go by another setup."""
        self.setup, self.config = setup, setup.config
        self.refreshes = 0
        self.branches.uncond_first = self.config.cfg_compute_first
        self.branches.start_loop()

    def start(self) -> None:
        """Begin with the first step; branches keep their names."""
        self.calls = 0
        self.branch_calls: Counter[str | None] = Counter()
        self._forms: dict[str | None, Any] = {}
        self._inputs: dict[str | None, frozenset[str]] = {}
        self._first: Any = None
        self._conditions: list[Any] = []

    @property
    def mixes_branches(self) -> bool:
        """Whether two conditionings took turns in a lane that they share."""
        known = self._conditions
        first, second = known[:2] if len(known) == MOST_CONDITIONS else (None, None)
        turns = zip(known, (first, second) * 2, strict=False)
        return first is not second and all(one is other for one, other in turns)

    @contextmanager
    def named(
        self, name: str, step_index: int | None = None, num_inference_steps: int | None = None
    ) -> Iterator[None]:
        """Name the guidance branch of the calls inside, as `cache_context` of diffusers does."""
        outer, self.name = self.name, name
        outer_index, self._step_index = self._step_index, step_index
        if num_inference_steps is not None and not self.shares_steps:
            self.known_steps = num_inference_steps
        try:
            yield
        finally:
            self.name, self._step_index = outer, outer_index

    def num_steps(self) -> Steps:
        """Return the steps of this request, what its scheduler has at most, and a shared loop."""
        plan = self.planned_steps
        planned, at_most, loop = (None, None, None) if plan is None else plan()
        known = self.known_steps if planned is None else planned
        return (self.config.num_inference_steps if known is None else known), at_most, loop

    def is_over(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], time: float | None = None
    ) -> bool:
        """Say whether a call begins the request anew; tell the branches of a step that ended.

        Args:
            args: of the call, as `kwargs`.
            time: of the call, where it was read already.
        """
        if self.by_time:
            move = self._move(args, kwargs, time)
            if move is not Move.UNKNOWN:
                self.branches.know_steps()
            # what was started is one request, also where its time turns back
            if move in (Move.ON, Move.BACK) and self.calls:
                self.branches.end_step()
        if self.follows:
            return False
        steps = self.config.num_inference_steps if self.known_steps is None else self.known_steps
        if steps is None:
            return self._move(args, kwargs) is Move.BACK
        name = self._name(kwargs) if LEAVES_OUT in kwargs else self.name
        if name is None and self.setup.separate_cfg:
            name = self.branches.two_names[self.calls % 2]
        return self.branch_calls[name] >= steps

    def _name(self, kwargs: dict[str, Any]) -> str | None:
        """Return the name of a call, None without."""
        if not kwargs.get(LEAVES_OUT):
            return self.name
        return LEAVES_OUT if self.name is None else f"{self.name}, {LEAVES_OUT}"

    def _move(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], time: float | None = None
    ) -> Move:
        """Return how the time of a call lies to that of the call before."""
        if is_capturing():
            return Move.UNKNOWN
        self._looks_at_times = True
        now = time if self._step_index is None else self._step_index
        return self._times.move(args, kwargs) if now is None else self._times.move_to(now)

    def find_branch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Find the branch of a call; return why a cached step would not continue it, if so."""
        branch = self._name(kwargs) if LEAVES_OUT in kwargs else self.name
        reasons: list[str] = []
        is_asked = branch is None and self.config.enable_separate_cfg is not None
        if self.follows and not is_asked:
            condition = self.setup.condition_of(args, kwargs)
            if not isinstance(condition, torch.Tensor):
                condition = None
            if self._first is None:
                self._first = self._times.seen(args, kwargs)
            elif self.branches.comes_again(branch, condition):
                self.branches.tell_first_step(self._times.is_at(self._first, args, kwargs))
            branch, is_late = self.branches.of_call(branch, condition)
            if is_late:
                reasons.append("their branch of guidance had not run just before")
        elif branch is None and self.setup.separate_cfg:
            branch = self.branches.two_names[self.calls % 2]
        elif branch is None and not is_asked and self.calls < MOST_CONDITIONS:
            self._conditions.append(self.setup.condition_of(args, kwargs))
        # what must stay the same from step to step: what is given, and the scale of adapters
        scales: list[Any] = []
        for name in ATTENTION_OPTIONS:
            if name in kwargs and isinstance(kwargs[name], dict):
                scales.append(kwargs[name].get("scale"))
                if IMAGES & kwargs[name].keys():
                    scales += self._image_scales.now()
        form = [*kwargs], [*map(_is_none, kwargs.values())], scales
        known = self._forms.get(branch)
        if known != form:
            given = frozenset(name for name, value in kwargs.items() if value is not None)
            changed = sorted(self._inputs.get(branch, given) ^ given)
            if changed or (known is not None and known[2] != scales):
                named = ", ".join(changed) or "the scale of an adapter"
                reasons.append(f"inputs came, went or changed ({named})")
            self._forms[branch], self._inputs[branch] = form, given
        self.branch, self.inputs = branch, self._inputs[branch]
        return reasons

    def end_call(self) -> None:
        """Count a call that has ended without an exception."""
        self.calls += 1
        self.branch_calls[self.branch] += 1
        if self._looks_at_times:
            self._times.end_call()
