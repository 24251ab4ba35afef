"""One forward over rows of several requests, each at a step of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from dbcache.adapters.blocks.signature import TIMESTEPS, ArgumentFinder
from dbcache.adapters.requests.context import active
from dbcache.adapters.requests.request import Request
from dbcache.adapters.requests.request_handle import RequestHandle
from dbcache.adapters.stacks.row_step import Member


class Row(NamedTuple):
    """One row of the batch.

    Attributes:
        request: whose image it is.
        name: of the guidance branch, None where the request has one, or the caller names it.
    """

    request: Request
    name: str | None


class RowGroup:
    """Takes the part of a request in forwards whose samples belong to several.

    Args:
        rows: whose each sample of the batch is, in order.
    """

    is_closed = False

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.first = rows[0].request
        self._find_time = ArgumentFinder(self.first.module, TIMESTEPS)
        known = [row.request.setup.stacks for row in rows if row.request.setup.stacks]
        for stacks in known:
            if [stack.geometry for stack in stacks] != [stack.geometry for stack in known[0]]:
                raise ValueError(
                    "rows: all requests must skip the same blocks, got requests with other Fn, Bn "
                    "or lists; start them with the same options for blocks"
                )

    @property
    def clock(self) -> RowGroup:
        """What names calls, as the clock of a request does."""
        return self

    @contextmanager
    def named(self, name: str, **told: Any) -> Iterator[None]:
        """Name the guidance branch of all rows that were given none."""
        with ExitStack() as stack:
            for request in {row.request: None for row in self.rows if row.name is None}:
                stack.enter_context(request.clock.named(name, **told))
            yield

    def move_to(self, setup: Any) -> None:
        """Refuse to begin anew: the rows are those of requests that go on."""
        raise RuntimeError(
            "refresh_context: must not be called inside of dbcache.rows, got a call there; start "
            "another request instead"
        )

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward; each sample takes the step of its request.

        Raises:
            ValueError: no argument has as many rows as there are.
        """
        self._check_batch((*args, *kwargs.values()))
        begun: list[tuple[Request, str | None]] = []
        try:
            members = self._begin(args, kwargs, begun)
            for request, _ in begun:
                for run in request.lane_set.runs:
                    run.take_up_blocks()
            news = [request for request, _ in begun if not request.setup.stacks]
            if news:  # blocks are learned first, in a full step that no lane counts
                output = news[0].learn(args, kwargs)
            else:
                output = self.first.run(args, kwargs, members=members)
        except BaseException:
            for request, _ in begun:
                request.clock.branches.undo_call()
            raise
        for request, branch in begun:
            request.clock.branch = branch
            request.clock.end_call()
        return output

    def _begin(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        begun: list[tuple[Request, str | None]],
    ) -> list[Member]:
        """Begin the step of each request; return whose each row is."""
        time = self._find_time(args, kwargs)
        times = self._times(time)
        told = [self.first.setup.condition_of(args, kwargs), time]
        branches: dict[Row, str | None] = {}
        places: Counter[Row] = Counter()
        members = []
        for index, row in enumerate(self.rows):
            request = row.request
            if row not in branches:
                own = {name: self._of_row(x, index, told) for name, x in kwargs.items()}
                rest = tuple(self._of_row(x, index, told) for x in args)
                with ExitStack() as stack:
                    if row.name is not None:
                        stack.enter_context(request.clock.named(row.name))
                    if any(request is other for other, _ in begun):
                        for reason in request.clock.find_branch(rest, own):
                            request.force_full(reason, request.branch)
                    else:
                        request.begin_step(rest, own, time=times[index])
                branches[row] = request.branch
                begun.append((request, request.branch))
            if request.setup.stacks and not request.lane_set.runs:  # learned since it began
                request.take_lanes_anew(rest, own)
            members.append(Member(request.lane_set.runs, branches[row], places[row]))
            places[row] += 1
        return members

    def _of_row(self, value: Any, index: int, told: list[Any]) -> Any:
        """Return a row of an argument; of what is looked at otherwise, only that it is there."""
        if isinstance(value, torch.Tensor) and not any(value is x for x in told):
            is_row = value.ndim and value.shape[0] == len(self.rows)
            return value[index : index + 1] if is_row else value
        return None if value is None else True if isinstance(value, torch.Tensor) else value

    def _times(self, time: Any) -> list[float | None]:
        """Return the time of each row; reads them from the device, once."""
        if isinstance(time, int | float):
            return [float(time)] * len(self.rows)
        if not isinstance(time, torch.Tensor) or not time.numel():
            return [None] * len(self.rows)
        count = len(self.rows)
        by_row = time.flatten(1).amax(1) if time.ndim > 1 else time.reshape(-1)
        values = by_row.tolist()
        return values if len(values) == count else [max(values)] * count

    def _check_batch(self, values: Sequence[Any]) -> None:
        count = len(self.rows)
        tensors = [x for x in values if isinstance(x, torch.Tensor) and x.ndim]
        if not any(x.shape[0] == count for x in tensors):
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
            raise ValueError(
                f"rows: the batch must have one row per request that is named, {count}, got "
                f"tensors of {shapes or 'no'} shape; name a request once per row of the batch"
            )


@contextmanager
def rows(requests: Sequence[RequestHandle | tuple[RequestHandle, str]]) -> Iterator[None]:
    """Let the samples of each forward called inside belong to several requests.

        with dbcache.rows([first, second, second]):        # three rows, two requests
            noise = transformer(hidden_states, timestep=torch.tensor([900.0, 500.0, 500.0]), ...)

    Each request takes a step of its own: its time, plan, threshold and counts are those that it
    would have alone, and so is its result, up to rounding. The cache must be enabled with
    ``batch_reduce="each"``.

    Args:
        requests: whose each row of the batch is, in order: an open request, or the request and the
            name of the guidance branch. One that is named twice has two rows.

    Raises:
        ValueError: there are none, they are not of the same transformers, skip other blocks, or
            decide for a batch as a whole.
        RuntimeError: one of them was closed.
    """
    named = [entry if isinstance(entry, tuple) else (entry, None) for entry in requests]
    if not named:
        raise ValueError("rows: one request per row of the batch must be given, got none")
    by_module: dict[int, list[Row]] = {}
    for handle, name in named:
        for key, request in handle.requests().items():
            by_module.setdefault(key, []).append(Row(request, name))
            if request.setup.config.batch_reduce != "each":
                raise ValueError(
                    f"rows: the requests must decide for each row by itself, got one with "
                    f"batch_reduce={request.setup.config.batch_reduce!r}; enable the cache with "
                    f"batch_reduce='each'"
                )
    if any(len(own) != len(named) for own in by_module.values()):
        raise ValueError(
            "rows: all requests must be of the same transformers, got requests of different ones; "
            "run those one after another"
        )
    with active({key: RowGroup(own) for key, own in by_module.items()}):
        yield
