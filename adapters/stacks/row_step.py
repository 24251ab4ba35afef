"""A step whose samples decide for themselves: the middle blocks run on those that need them.

Each sample has a lane of its own, and so a plan, limits, a ring and a predictor. The middle blocks
are given the rows of the samples that run in full, with every argument that has a row per sample
cut alike; the rest of the batch passes, and gets its prediction at the last middle block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dbcache.adapters.stacks.gradients import followed
from dbcache.adapters.stacks.proxies import MiddleBlock
from dbcache.adapters.stacks.stack_run import StackRun, row_key
from dbcache.adapters.stacks.step import Step
from dbcache.lanes.buffers import Layout
from dbcache.lanes.row_lanes import RowLanes


class Member(NamedTuple):
    """Whose row a sample of a forward is.

    Attributes:
        runs: what the request keeps, by stack.
        branch: guidance branch of the row.
        place: which row of that branch.
    """

    runs: Sequence[StackRun]
    branch: str | None
    place: int


class RowStep(Step):
    """The step of a stack whose samples decide for themselves; see `Step` for the arguments.

    Attributes:
        full: samples on which the middle blocks run, int64 on the device of the blocks; None where
            that is all of them, or none.
    """

    def __init__(self, stack: Any, run: StackRun, branch: str | None, forward: Any) -> None:
        super().__init__(stack, run, branch, forward)
        self.full: torch.Tensor | None = None
        self._cut: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def decide(self, h_fn: torch.Tensor, encoder_in: torch.Tensor | None) -> None:
        super().decide(h_fn, encoder_in)
        lane = self.lane
        if lane is None or not (lane.cached and lane.full):
            return
        self.full = torch.tensor(lane.full, dtype=torch.long, device=h_fn.device)
        self.prediction = self.made = lane.predict(*self.passed)
        if h_fn.requires_grad:
            self.prediction = followed(self, self.passed, self.made)

    def _decide(
        self, lane: RowLanes, h_fn: torch.Tensor, measured: torch.Tensor, layout: Layout
    ) -> bool:
        assert self.h_in is not None
        lane.decide_each(self.h_in, measured, layout)
        return not lane.full

    def _add_lane(self, device: torch.device) -> RowLanes:
        assert self.h_in is not None
        return RowLanes(self._find_lanes(self.h_in))

    def _find_lanes(self, h_fn: torch.Tensor) -> list[Any]:
        """Return the lane of each sample; new ones have not taken a step."""
        members = self.forward.members
        if members is None:
            runs = self.forward.runs
            members = [Member(runs, self.branch, place) for place in range(h_fn.shape[0])]
        if len(members) != h_fn.shape[0]:
            raise ValueError(
                f"{self.stack.name}: the blocks must be given one row per sample, got "
                f"{tuple(h_fn.shape)} for {len(members)} rows of requests; name as many in "
                f"dbcache.rows as the batch has samples"
            )
        counts = {(id(runs), branch): (runs, place + 1) for runs, branch, place in members}
        for (_, branch), (runs, count) in counts.items():
            runs[self.stack.index].note_samples(branch, count)
        lanes = []
        for runs, branch, place in members:
            run, key = runs[self.stack.index], row_key(branch, place)
            if key not in run.lanes:
                check_samples(self.stack, h_fn, self.forward.given)
                run.lanes[key] = self.stack.new_lane(run, branch, h_fn.device, self)
            lanes.append(run.lanes[key])
        return lanes

    def run_rows(self, proxy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block on the samples that need it.

        Returns:
            What it returns, for the whole batch: the others keep what they were given, and have
            their prediction behind the last middle block.
        """
        cut_args, cut_kwargs = self._cut_all(args), self._cut_all(kwargs)
        hidden, encoder = proxy.form.unpack(proxy.run_whole(cut_args, cut_kwargs))
        rest = proxy.given(args, kwargs)
        for stream in rest:
            self._cut.pop(id(stream), None)
        if proxy.is_last:
            assert self.prediction is not None
            rest = self.prediction
        return proxy.form.pack(self._put(rest[0], hidden), self._put(rest[1], encoder))

    def _put(self, rest: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor | None:
        """Return the batch `rest` with the rows of the samples that ran in full."""
        if rest is None or rows is None:
            return rows
        assert self.full is not None
        return rest.to(rows.dtype).index_copy(0, self.full, rows)

    def _cut_all(self, value: Any) -> Any:
        """Return arguments with the rows of samples that run in full, wherever there is one each.

        What all blocks are given is cut once per step.
        """
        if isinstance(value, torch.Tensor):
            if value.ndim == 0 or value.shape[0] != len(self.h_fn):
                return value
            known = self._cut.get(id(value))
            if known is None or known[0] is not value:
                assert self.full is not None
                self._cut[id(value)] = known = value, value.index_select(0, self.full)
            return known[1]
        if isinstance(value, dict):
            return {
                name: part if _is_of_tokens(name, part) else self._cut_all(part)
                for name, part in value.items()
            }
        if type(value) in (tuple, list):
            return type(value)(self._cut_all(part) for part in value)
        return value

    def count_full(self, device: torch.device) -> None:
        """Leave such a step out: how many samples there are is not known yet."""


POSITIONS = ("rotary", "rope", "freqs", "pos_", "position", "_ids")
"""Parts of the names of arguments that hold something per token, which all samples share."""


def _is_of_tokens(name: Any, value: Any) -> bool:
    """Whether an argument has a row per token rather than per sample, be there as many or not."""
    parts = value if isinstance(value, tuple | list) else (value,)
    is_flat = all(isinstance(x, torch.Tensor) and x.ndim <= 2 for x in parts)
    return is_flat and isinstance(name, str) and any(part in name for part in POSITIONS)


def check_samples(stack: Any, h_fn: torch.Tensor, given: tuple[Any, ...]) -> None:
    """Raise a ValueError if the blocks are given rows that are not the samples of the batch.

    Args:
        stack: the blocks.
        h_fn: what they are given.
        given: arguments of the transformer, by place and by name: one has as many rows, or parts.
    """
    args, kwargs = given
    batches = {
        len(x)
        for x in (*args, *kwargs.values())
        if isinstance(x, list) or (isinstance(x, torch.Tensor) and x.ndim)
    }
    if h_fn.shape[0] not in batches:
        raise not_samples(stack, f"hidden states {tuple(h_fn.shape)} for {sorted(batches)} samples")


def not_samples(stack: Any, reason: str) -> ValueError:
    """Return the error for a stack in which samples cannot decide for themselves."""
    model = type(stack.lists[0].owner).__name__
    return ValueError(
        f"{model}.{stack.name}: batch_reduce must be 'mean' or 'max' here, got 'each'; {reason}"
    )


class RowBlock(MiddleBlock):
    """A middle block that may run on some of the samples."""

    __slots__ = ()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = self.step()
        if step is None or step.full is None:
            return super().run(args, kwargs)
        return step.run_rows(self, args, kwargs)

    def run_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block on what it is given."""
        return super().run(args, kwargs)
