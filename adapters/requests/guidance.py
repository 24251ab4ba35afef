"""Which guidance branch a call of a transformer belongs to, found from the calls of its pipeline.

A pipeline calls its transformer once per step, or once for each branch of guidance, and a branch
may come and go: guidance in an interval, an extra branch on some steps. Where the pipeline names
its calls (`cache_context`) there is nothing to find. Otherwise a branch is known by the tensor
that conditions it, such as the prompt's embeddings: pipelines make it once and pass the same
object at each step. Where it is made anew for each call, or is another at every step (prompts that
travel), a branch is known by its place among the calls of a step. The scheduler says where a step
ends. Only identities of objects are compared: nothing is read from the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

ATTENTION_OPTIONS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")
"""Parameters whose "scale" is that of LoRA weights."""

LEAVES_OUT = "skip_layers"
"""Parameter that leaves blocks out (skip-layer guidance of Stable Diffusion 3)."""

FEW = 4
"""Branches that there may be before idle ones are taken over, or a scheduler is doubted."""


@dataclass(slots=True, eq=False)
class Branch:
    """One branch of guidance.

    Attributes:
        key: its name; None for the first one that has none.
        condition: the tensor that its last call was conditioned on, as long as that lives.
        step: the step of its last call.
        call: which of all calls that was.
        distance: steps from one of its calls to the next; 0 if that is open.
        repeats: calls before the last one that had the same tensor, without a break.
        travels: the tensor was another at the last call, and so it was at the one before.
        follows: the branch that was at its place in the step before its first call.
        since: the step of its first call.
        before: the tensor that it had before `condition`.
    """

    key: str | None
    step: int
    condition: weakref.ref[Any] | None = None
    call: int = 0
    distance: int = 1
    repeats: int = 0
    travels: bool = False
    follows: Branch | None = None
    since: int = 0
    before: weakref.ref[Any] | None = None

    def is_known_by(self, condition: torch.Tensor | None) -> bool:
        """Say whether its last call had this very tensor."""
        return (
            condition is not None and self.condition is not None and self.condition() is condition
        )

    def could_have(self, condition: torch.Tensor | None) -> bool:
        """Say whether its next call may come with this tensor instead of that of the last one.

        So it is if that is gone and cannot come again, or if guidance was switched in the batch.
        """
        last = None if self.condition is None else self.condition()
        return condition is None or last is None or condition.shape[:1] != last.shape[:1]

    def changes_often(self) -> bool:
        """Say whether its next call may well have another tensor, the last one being there still.

        So it is if that came once only, or if the one before it has never come again.
        """
        follows = self.follows
        return self.repeats == 0 or (follows is not None and follows.step < self.since)

    def take(self, condition: torch.Tensor | None, call: int) -> None:
        """Take note of a call."""
        is_same = condition is None or self.is_known_by(condition)
        self.repeats = self.repeats + 1 if is_same else 0
        if not is_same:
            self.before = self.condition
        self.condition = None if condition is None else weakref.ref(condition)
        self.call = call


class Branches:
    """Finds the branch of each call, within one denoising loop after another.

    Attributes:
        tells_steps: a scheduler, or the time of the calls, says where steps end. Without that a
            branch that comes again begins a step.
        is_doubted: a scheduler was there, and has said nothing.
        is_first_step: a call that came before, in the first step, came again with the same time.
        alternates: where steps have no end and conditions do not last, calls are those of two
            branches in turn.
        uncond_first: of two branches without names the first is the unconditional one.
    """

    def __init__(self, *, alternates: bool) -> None:
        self.alternates = alternates
        self.tells_steps = False
        self.uncond_first = False
        self.is_doubted = False

    def start_loop(self) -> None:
        """Forget all branches: a denoising loop begins."""
        self._named: dict[str, Branch] = {}
        self._found: list[Branch] = []
        self._step = 0
        self._calls = 0
        self._has_ended = False
        self._has_told = False
        self._in_step: dict[str, int] = {}
        self.is_first_step = False
        self._before: tuple[Any, int, Branch, tuple[int, int]] | None = None
        self._ran: tuple[Branch, ...] = ()
        self._ran_before: tuple[Branch, ...] = ()

    def know_steps(self) -> None:
        """Learn that the times of the calls tell where steps end, from the first call on."""
        self._has_told = self.tells_steps = True

    def end_step(self) -> None:
        """Take note that the scheduler made a step; the next call begins another."""
        self._has_ended = self._has_told = self.tells_steps = True
        self.is_doubted = False

    def comes_again(self, name: str | None, condition: torch.Tensor | None) -> bool:
        """Say whether a call like this one came before, without a word of a step in between."""
        if self._has_told or not self.tells_steps:
            return False
        if name is not None:
            return name in self._in_step
        return len(self._found) >= FEW or any(x.is_known_by(condition) for x in self._found)

    def tell_first_step(self, is_at_its_time: bool | None) -> None:
        """Learn whether a call that comes again is at the time of the first; None: unknown.

        One at another time shows that this scheduler is not asked for steps.
        """
        self.is_first_step = bool(is_at_its_time)
        if is_at_its_time is False:
            self.tells_steps, self.is_doubted = False, True

    def of_call(self, name: str | None, condition: torch.Tensor | None) -> tuple[str | None, bool]:
        """Return the key of the call's branch, and whether what that remembers is out of date.

        Args:
            name: the name that the pipeline gave to the call, None without.
            condition: the tensor that the call is conditioned on, None if there is none.

        It is out of date if the branch does not come in its usual rhythm, or was another's.
        """
        clock = self._step, self._has_ended, self._in_step.copy(), self._ran_before, self._ran
        if self._has_ended:
            self._step += 1
            self._has_ended = False
            self._in_step.clear()
            self._ran_before, self._ran = self._ran, ()
        found, was_another = len(self._found), False
        if name is not None:
            key = self._key_of(name)
            branch = self._named.setdefault(key, Branch(key, self._step))
        else:
            branch, was_another = (
                self._known(condition)
                or self._by_place(condition)
                or self._travelled(condition)
                or self._new(condition)
            )
            self._calls += 1
            self._ran = (*self._ran, branch)
            branch.take(condition, self._calls)
        self._before = clock, found, branch, (branch.step, branch.distance)
        return branch.key, self._is_late(branch) or was_another

    def undo_call(self) -> None:
        """Forget the latest call, which an exception cut short: the call may come again."""
        if self._before is not None:
            clock, found, branch, rhythm = self._before
            self._step, self._has_ended, self._in_step, self._ran_before, self._ran = clock
            del self._found[found:]
            (branch.step, branch.distance), self._before = rhythm, None

    def _key_of(self, name: str) -> str:
        """Return the key of a call with a name; one that comes again in a step has its own."""
        if not self.tells_steps:
            return name
        place = self._in_step[name] = self._in_step.get(name, 0) + 1
        if place > FEW and not self._has_told and not self.is_first_step:
            self.tells_steps, self.is_doubted = False, True
            return name
        return name if place == 1 else f"{name} {place}"

    def _is_late(self, branch: Branch) -> bool:
        """Take note of a call of the branch; say whether it broke the rhythm of its calls."""
        distance, branch.step = self._step - branch.step, self._step
        if distance in (0, branch.distance):
            return False
        is_open = branch.distance == 0
        branch.distance = distance if is_open else 0
        return not is_open

    def _is_free(self, branch: Branch) -> bool:
        """Say whether the branch can be that of the call: it comes once per step."""
        return branch.step != self._step or not self.tells_steps

    def _known(self, condition: torch.Tensor | None) -> tuple[Branch, bool] | None:
        """Return the branch that has the condition."""
        for branch in self._found:
            if branch.is_known_by(condition) and self._is_free(branch):
                return branch, False
        return None

    def _by_place(self, condition: torch.Tensor | None) -> tuple[Branch, bool] | None:
        """Return the branch at the call's place in the step, unless it is known by a condition."""
        place = len(self._ran)
        if not self.tells_steps:
            place = self._calls % 2 if self.alternates else 0
        if place < len(self._found):
            branch = self._found[place]
            if branch.could_have(condition) and self._is_free(branch):
                return branch, False
        return None

    def _at_place(self) -> Branch | None:
        """Return the branch that was at the call's place in the step before."""
        place, before = len(self._ran), self._ran_before
        return before[place] if self._has_told and place < len(before) else None

    def _travelled(self, condition: torch.Tensor | None) -> tuple[Branch, bool] | None:
        """Return the branch at the call's place if its condition is another at every step.

        One that comes back did not travel: two branches took turns at that place.
        """
        branch = self._at_place()
        if branch is None or not self._is_free(branch) or not branch.changes_often():
            return None
        if condition is not None and branch.before is not None and branch.before() is condition:
            return None
        was_another, branch.travels = not branch.travels or branch.repeats > 0, True
        return branch, was_another

    def _new(self, condition: torch.Tensor | None) -> tuple[Branch, bool]:
        """Return a branch for a call that is of none found so far."""
        if len(self._found) >= FEW:
            if self.tells_steps and not (self._has_told or self.is_first_step):
                # so many calls and no step: it seems that this scheduler is not asked for steps
                self.tells_steps, self.is_doubted = False, True
                return self._known(condition) or (self._found[0], True)
            idle = min(self._found, key=lambda branch: branch.call)
            if not self.tells_steps or idle.step < self._step - 1:
                return idle, True
        branch = Branch(self._next_key(), self._step, follows=self._at_place(), since=self._step)
        self._found.append(branch)
        return branch, False

    def _next_key(self) -> str | None:
        if not self._found:
            return None
        if len(self._found) == 1 and self._ran:
            return self.two_names[1]
        return f"branch {len(self._found) + 1}"

    @property
    def two_names(self) -> tuple[str, str]:
        """Names of two branches that have none, in the order of their calls within a step."""
        return ("uncond", "cond") if self.uncond_first else ("cond", "uncond")

    def shown(self, key: str | None, keys: Collection[str | None]) -> str | None:
        """Return how the branch `key` is called; `keys` are all that ran."""
        if key is not None or not any(other.key in keys for other in self._found[1:]):
            return key
        return self.two_names[0] if self.two_names[1] in keys else "branch 1"
