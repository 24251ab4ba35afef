"""The clock of a request: which step and which guidance branch a call of the transformer is."""

from __future__ import annotations

import functools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dbcache.adapters.requests.guidance import ATTENTION_OPTIONS, LEAVES_OUT, Branches
from dbcache.adapters.requests.setup import Setup
from dbcache.adapters.requests.step_times import Move, StepTimes
from dbcache.adapters.signals.ip_adapter import IMAGES, ImageScales

_is_none = functools.partial(operator.is_, None)

MOST_CONDITIONS = 4
"""Of the first calls, which show whether branches that nobody names take turns."""


def is_capturing() -> bool:
    """Whether the current stream is captured by someone. CPU builds of PyTorch cannot tell."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Clock:
    """Counts the calls of one request, and finds their branches.

    Args:
        setup: the settings.
        force_full: method of the request, called with a reason and a branch whose next step must be
            a full one; held weakly, so that a request that is dropped frees its buffers at once.
        steps: of the request, where the caller knows; None: the config or a scheduler may tell.
        follows: branches are found from the calls. Without that, calls are one branch, or two in
            turn, and `num_inference_steps` calls or a time that runs back begin the request anew.

    Attributes:
        branch: of the call under way; `inputs` are the names of the arguments that it is given.
        name: what the caller named the call, None without.
        shares_steps: another transformer runs some of the steps that a pipeline tells of.
        shared_steps: of the loop whose steps are shared so.
        calls: since the request began.
        planned_steps: returns the steps that a pipeline plans, and those of its scheduler that
            fall to this transformer.
    """

    def __init__(
        self,
        setup: Setup,
        force_full: Callable[[str, Any], None],
        *,
        steps: int | None,
        follows: bool,
    ) -> None:
        self.follows = follows
        self.known_steps = steps
        self.planned_steps: Callable[[], tuple[int | None, int | None]] | None = None
        self.shares_steps = False
        self.shared_steps: int | None = None
        self.branch: str | None = None
        self.inputs: frozenset[str] = frozenset()
        self.name: str | None = None
        self.branches = Branches(alternates=setup.spec.separate_cfg)
        self._its_force_full = weakref.WeakMethod(force_full)
        self._times = StepTimes(setup.module)
        self._image_scales = ImageScales(setup.module)
        self._looks_at_times = False
        self._step_index: int | None = None
        self._by_time = False
        self.restart(setup)

    def restart(self, setup: Setup) -> None:
        """Forget all steps and branches, and go by another setup."""
        self.setup, self.config = setup, setup.config
        self.refreshes = 0
        self.branches.uncond_first = self.config.cfg_compute_first
        self.branches.start_loop()
        self.start()

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

    def follow(self, *, tells_steps: bool, by_time: bool = False) -> None:
        """Find the guidance branches from the calls.

        Args:
            tells_steps: a scheduler says where steps end.
            by_time: the time says it that each call is given.
        """
        self._by_time = by_time
        self.branches.follow(tells_steps=tells_steps)

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

    def num_steps(self) -> tuple[int | None, int | None]:
        """Return the steps of this request, and those that its scheduler has at most."""
        planned, at_most = (None, None) if self.planned_steps is None else self.planned_steps()
        known = self.known_steps if planned is None else planned
        return (self.config.num_inference_steps if known is None else known), at_most

    def is_over(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], time: float | None = None
    ) -> bool:
        """Say whether a call begins the request anew; tell the branches of a step that ended.

        Args:
            args: of the call, as `kwargs`.
            time: of the call, where it was read already.
        """
        if self.follows:
            if self._by_time:
                self._tell_step(self._move(args, kwargs, time))
            return False
        steps = self.config.num_inference_steps if self.known_steps is None else self.known_steps
        if steps is None:
            return self._move(args, kwargs) is Move.BACK
        name = self._name(kwargs) if LEAVES_OUT in kwargs else self.name
        if name is None and self.setup.separate_cfg:
            name = self._by_parity()
        return self.branch_calls[name] >= steps

    def _name(self, kwargs: dict[str, Any]) -> str | None:
        """Return the name of a call, None without."""
        if not kwargs.get(LEAVES_OUT):
            return self.name
        return LEAVES_OUT if self.name is None else f"{self.name}, {LEAVES_OUT}"

    def _by_parity(self) -> str:
        """Return the name of a call that has none, by the parity of the calls."""
        is_second = self.calls % 2 == 1
        return "uncond" if is_second != self.config.cfg_compute_first else "cond"

    def _tell_step(self, move: Move) -> None:
        """Tell the branches what the time of a call says of the step before."""
        if move is not Move.UNKNOWN:
            self.branches.know_steps()
        if move is Move.ON and self.calls:
            self.branches.end_step()

    def _move(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], time: float | None = None
    ) -> Move:
        """Return how the time of a call lies to that of the call before."""
        if is_capturing():
            return Move.UNKNOWN
        self._looks_at_times = True
        now = time if self._step_index is None else self._step_index
        move = self._times.move(args, kwargs) if now is None else self._times.move_to(now)
        if self.follows and move is Move.BACK:  # what was started is one request, however it runs
            return Move.ON
        return move

    def find_branch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the branch of a call; see to it that a cached step would continue it."""
        branch = self._name(kwargs) if LEAVES_OUT in kwargs else self.name
        is_asked = branch is None and self.config.enable_separate_cfg is not None
        if not self.branches.is_active or is_asked:
            if branch is None and self.setup.separate_cfg:
                branch = self._by_parity()
            elif self.calls < MOST_CONDITIONS and not is_asked and branch is None:
                self._conditions.append(self.setup.condition_of(args, kwargs))
        else:
            condition = self.setup.condition_of(args, kwargs)
            if not isinstance(condition, torch.Tensor):
                condition = None
            if self._first is None:
                self._first = self._times.seen(args, kwargs)
            elif self.branches.comes_again(branch, condition):
                self.branches.tell_first_step(self._times.is_at(self._first, args, kwargs))
            branch, is_late = self.branches.of_call(branch, condition)
            if is_late:
                self._force_full("their branch of guidance had not run just before", branch)
        # what must stay the same from step to step: what is given, and the scale of adapters
        scales: list[Any] = []
        if not ATTENTION_OPTIONS.isdisjoint(kwargs):
            for argument, value in kwargs.items():
                if argument in ATTENTION_OPTIONS and isinstance(value, dict):
                    scales.append(value.get("scale"))
                    if IMAGES & value.keys():
                        scales += self._image_scales.now()
        form = [*kwargs], [*map(_is_none, kwargs.values())], scales
        known = self._forms.get(branch)
        if known != form:
            self._note_change(branch, known, form)
        self.branch, self.inputs = branch, self._inputs[branch]

    def _force_full(self, reason: str, branch: str | None) -> None:
        force_full = self._its_force_full()
        assert force_full is not None  # who calls the clock holds the request
        force_full(reason, branch)

    def _note_change(self, branch: str | None, known: Any, form: Any) -> None:
        """Make the next step of a branch a full one if other arguments are given than before."""
        given = frozenset(name for name, is_none in zip(*form[:2], strict=True) if not is_none)
        before = self._inputs.get(branch, given)
        self._forms[branch], self._inputs[branch] = form, given
        changed = sorted(before ^ given)
        if changed or (known is not None and known[2] != form[2]):
            named = ", ".join(changed) or "the scale of an adapter"
            self._force_full(f"inputs came, went or changed ({named})", branch)

    def end_call(self) -> None:
        """Count a call that has ended without an exception."""
        self.calls += 1
        self.branch_calls[self.branch] += 1
        if self._looks_at_times:
            self._times.end_call()
