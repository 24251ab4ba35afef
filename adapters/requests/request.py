"""One image or video on one transformer: its lanes, settings, plan, clock and statistics."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dbcache.adapters.blocks.block_list import FORWARD, Entry, Place, Shown
from dbcache.adapters.requests.guidance import ATTENTION_OPTIONS, LEAVES_OUT, Branches
from dbcache.adapters.requests.record import RequestRecord
from dbcache.adapters.requests.setup import Setup
from dbcache.adapters.requests.step_times import Move, StepTimes
from dbcache.adapters.stacks.stack_run import LaneSet
from dbcache.graphs.cuda_capture import UserCapture
from dbcache.graphs.recording import Cutter
from dbcache.graphs.trial import Restorable
from dbcache.lanes.lane_copy import AnyLane, LaneCopy
from dbcache.lanes.shared_change import SharedCopy

ALL = object()
"""Stands for all branches."""


def is_capturing() -> bool:
    """Whether the current stream is captured by someone. CPU builds of PyTorch cannot tell."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Views:
    """Shows a model other blocks in its lists, for as long as any forward with a cache runs.

    Forwards overlap where threads share the model. As long as all see the same rows these lie in
    the lists' place; proxies of a forward without a cache then just call their blocks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forwards = 0
        self._over: dict[tuple[int, str], Any] = {}
        self._first: Shown | None = None

    def show(self, over: Shown) -> None:
        """Let a forward that begins see its rows."""
        with self._lock:
            self._forwards += 1
            if self._first is None:
                self._first = over
                for own, name, row, _ in over.entries:
                    self._over[id(own), name] = own
                    own[name] = row
            elif self._first is not over:  # forwards see different rows
                for own, name, _, view in (*self._first.entries, *over.entries):
                    self._over[id(own), name] = own
                    own[name] = view

    def hide(self) -> None:
        """Note that a forward has ended; the last one lets the model see its own lists again."""
        with self._lock:
            self._forwards -= 1
            if self._forwards < 1:
                self._forwards, self._first = 0, None
                for (_, name), own in self._over.items():
                    own.pop(name, None)
                self._over.clear()


class Forward:
    """One forward of the transformer under way: the steps of all stacks, and what it sees."""

    __slots__ = ("cutter", "rows", "steps")

    def __init__(
        self, rows: Mapping[Place, list[Entry]], cutter: Cutter | None, lanes: LaneSet, branch: Any
    ) -> None:
        self.rows = rows
        self.cutter = cutter
        self.steps: list[Any] = []
        for run in lanes.runs:
            self.steps.append(run.stack.step(run.stack, run, branch, self))


class Request:
    """One image or video on one transformer.

    Args:
        setup: the blocks and their settings, which requests share.
        steps: how many it has, where the caller knows; None: the config or a scheduler may tell.
        follows: guidance branches are found from the calls, which belong to this request alone.
            Without that, calls are one lane, or two in turn, and `num_inference_steps` calls or a
            time that runs back begin the request anew.
        renew: returns the setup to go on with when the request begins anew by itself.

    Attributes:
        config: the settings that concern the transformer as a whole.
        branch: guidance branch of the call under way.
        name: what the caller named the call, None without.
        shares_steps: another transformer runs some of the steps that a pipeline tells of.
        calls: forwards so far.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        steps: int | None = None,
        follows: bool,
        renew: Callable[[], Setup | None] | None = None,
    ) -> None:
        self.setup = setup
        self.config = setup.config
        self.module = setup.module
        self.known_steps = steps
        self.planned_steps: Callable[[], tuple[int | None, int | None]] | None = None
        self.follows = follows
        self._renew = renew
        self.shares_steps = False
        self.is_closed = False
        self.record: RequestRecord | None = None
        self.lane_set: LaneSet | None = None
        self.branch: str | None = None
        self.name: str | None = None
        self.branches = Branches(alternates=setup.spec.separate_cfg)
        self.times: StepTimes | None = None
        self.sharded: Any = None
        self._step_index: int | None = None
        self.loops = 0
        self._by_time = False
        self.restart()

    @property
    def renews(self) -> bool:
        """Whether it begins anew by itself: nobody started it."""
        return self._renew is not None

    # --- the clock: requests, steps and guidance branches -----------------------------------

    def restart(self) -> None:
        """Forget all steps and branches: what comes is another image, or loop of a video."""
        self.loops += 1
        self.partial_calls = 0
        self.forced: Counter[str] = Counter()
        self._refreshes = 0
        self.branches.uncond_first = self.config.cfg_compute_first
        self.branches.start_loop()
        self.start()

    def follow(self, *, tells_steps: bool, by_time: bool = False) -> None:
        """Find the guidance branches from the calls.

        Args:
            tells_steps: a scheduler says where steps end.
            by_time: the time says it that each call is given.
        """
        self._by_time = by_time
        self.branches.follow(tells_steps=tells_steps)

    def start(self) -> None:
        """Begin with the first step; branches keep their names."""
        self.calls = 0
        self.began_in_capture = is_capturing()
        self.branch_calls: Counter[str | None] = Counter()
        self._forms: dict[str | None, Any] = {}
        if self.lane_set is not None:
            self.lane_set.start_request()
        if self.setup.graphs is not None:
            self.setup.graphs.start_request()
        if self.setup.sharding is not None:
            self.sharded = self.setup.sharding.new_request()

    def start_loop(self, steps: int | None = None) -> None:
        """A denoising loop of `steps` steps begins; all but the first begin anew."""
        if steps is not None and self.known_steps is not None and self.follows:
            self.known_steps = steps
        if self.calls:
            self.restart()

    def end_step(self) -> None:
        """The scheduler made a step."""
        self.branches.end_step()

    def move_to(self, setup: Setup) -> None:
        """Begin anew with another setup, within the same call of a pipeline."""
        lanes, self.lane_set = self.lane_set, None
        if lanes is not None:
            self.setup.lanes.give(lanes)
        self.setup, self.config = setup, setup.config
        self.restart()

    def force_full(self, reason: str, branch: Any = ALL) -> None:
        """Make the next step of a branch, or of all, a full one; `reason` is for the summary."""
        runs = [] if self.lane_set is None else self.lane_set.runs
        keys = {key for run in runs for key in run.lanes} if branch is ALL else {branch}
        for key in keys:
            forgot = [run.forget(key) for run in runs]
            self.forced[reason] += any(forgot)

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

    def _begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin anew where that is due, and find the branch of the call."""
        name, config = self.name, self.config
        if kwargs.get(LEAVES_OUT):
            name = LEAVES_OUT if name is None else f"{name}, {LEAVES_OUT}"
        steps = config.num_inference_steps if self.known_steps is None else self.known_steps
        if self.follows:
            if self._by_time:
                self._tell_step(self._move(args, kwargs))
        elif (
            self.branch_calls[self._by_parity(name)] >= steps
            if steps is not None
            else self._move(args, kwargs) is Move.BACK
        ):
            new = None if self._renew is None else self._renew()
            if new is not None and new is not self.setup:
                self.move_to(new)
            self._refreshes = 0
            self.start()
        if self.calls == config.force_refresh_step_hint and (
            self._refreshes == 0 or config.force_refresh_step_policy == "repeat"
        ):
            self._refreshes += 1
            self.start()
        if self.lane_set is None:
            self._take_lanes(args, kwargs)
        if self.calls == 0:
            self._plan()
        self._find_branch(name, args, kwargs)

    def _plan(self) -> None:
        """Fit the plans of all lanes to the number of steps."""
        assert self.lane_set is not None
        steps = self.num_steps()
        for run in self.lane_set.runs:
            run.plan(*steps)

    def _tell_step(self, move: Move) -> None:
        """Tell the branches what the time of a call says of the step before."""
        if move is not Move.UNKNOWN:
            self.branches.know_steps()
        if move is Move.ON and self.calls:
            self.branches.end_step()

    def _move(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Move:
        """Return how the time of a call lies to that of the call before."""
        if is_capturing():
            return Move.UNKNOWN
        if self.times is None:
            self.times = StepTimes(self.module)
        move = (
            self.times.move(args, kwargs)
            if self._step_index is None
            else self.times.move_to(self._step_index)
        )
        if self.follows and move is Move.BACK:  # what was started is one request, however it runs
            return Move.ON
        return move

    def num_steps(self) -> tuple[int | None, int | None]:
        """Return the steps of this request, and those that its scheduler has at most."""
        planned, at_most = (None, None) if self.planned_steps is None else self.planned_steps()
        known = self.known_steps if planned is None else planned
        return (self.config.num_inference_steps if known is None else known), at_most

    def _by_parity(self, name: str | None) -> str | None:
        """Return the name of a call; where it has none, one by the parity of the calls."""
        if name is not None or not self.setup.separate_cfg:
            return name
        is_second = self.calls % 2 == 1
        return "uncond" if is_second != self.config.cfg_compute_first else "cond"

    def _find_branch(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the branch of a call; see to it that a cached step would continue it."""
        if not self.branches.is_active or (
            name is None and self.config.enable_separate_cfg is not None
        ):
            branch = self._by_parity(name) if self.setup.separate_cfg else name
        else:
            condition = self.setup.condition_of(args, kwargs)
            if not isinstance(condition, torch.Tensor):
                condition = None
            branch, is_late = self.branches.of_call(name, condition)
            if is_late:
                self.force_full("their branch of guidance had not run just before", branch)
        # what must stay the same from step to step: what is given, and the scale of LoRA
        given, scales = [], []
        for argument, value in kwargs.items():
            if value is not None:
                given.append(argument)
                if argument in ATTENTION_OPTIONS and isinstance(value, dict):
                    scales.append(value.get("scale"))
        form = given, scales
        known = self._forms.setdefault(branch, form)
        if known != form:
            self._note_change(branch, known, form)
        self.branch = branch

    def _note_change(self, branch: str | None, known: Any, form: Any) -> None:
        """Make the next step of a branch a full one if other arguments are given than before."""
        self._forms[branch] = form
        changed = sorted({*known[0]} ^ {*form[0]})
        if changed or known[1] != form[1]:
            named = ", ".join(changed) or "the scale of LoRA"
            self.force_full(f"inputs came, went or changed ({named})", branch)

    # --- forwards ---------------------------------------------------------------------------

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward with proxies in place of its blocks."""
        setup = self.setup
        if setup.spec.fills is not None and setup.spec.fills(kwargs):
            self.start_loop()
            return setup.original(*args, **kwargs)
        try:
            self._begin_step(args, kwargs)
            if self.sharded is None:
                output = self._step(args, kwargs)
            else:
                output = self.sharded(self.branch, lambda: self._step(args, kwargs))
        except BaseException:
            self.branches.undo_call()
            raise
        self.calls += 1
        self.branch_calls[self.branch] += 1
        if self.times is not None:
            self.times.end_call()
        return output

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        setup = self.setup
        if not setup.stacks:
            return self._learn(args, kwargs)
        cutter = self._user_capture() if is_capturing() else None
        # a branch whose calls leave blocks out has no step that could be recorded
        if setup.graphs is not None and cutter is None and self.branch not in setup.partial:
            return setup.graphs.step(self, args, kwargs)
        return self.run(args, kwargs, cutter)

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cutter: Cutter | None = None
    ) -> Any:
        """Run one step eagerly, or while a `cutter` records it, with proxies in place of blocks."""
        setup, lanes, shown = self.setup, self.lane_set, self.setup.shown
        assert lanes is not None
        for block_list in setup.lists:  # blocks may have been exchanged since
            holder: Any = block_list.owner._modules[block_list.name]
            if [*holder._modules.values()] != block_list.seen:
                shown = setup.take_up_blocks()
        for stack, entries in zip(setup.stacks, setup.entries, strict=True):
            if stack.entries is not entries:
                shown = setup.take_up_blocks()
                break
        for run in lanes.runs:
            if run.generation != run.stack.generation:
                run.take_up_blocks()
        outer, is_shown = FORWARD.get(), False
        forward = Forward(shown.rows, cutter, lanes, self.branch)
        try:
            FORWARD.set(forward)
            setup.views.show(shown)
            is_shown = True
            for run in lanes.runs:
                if cutter is not None:
                    run.stack.check_recordable(run.settings)
                if run.source is not None:
                    run.source.start(self.module, args, kwargs, may_read=cutter is None)
            output = setup.original(*args, **kwargs)
            for step in forward.steps:
                if step.awaits_end or step.lane is None:
                    step.check_end()
                if step.watches_output:
                    step.on_output(output)
        except BaseException:
            if cutter is not None:
                cutter.abort()
            for step in forward.steps:
                step.abort()
            raise
        finally:
            FORWARD.set(outer)
            if is_shown:
                setup.views.hide()
        self._end_steps(forward)
        return output

    def _end_steps(self, forward: Forward) -> None:
        """End the steps of a forward; those whose blocks were left out count as never begun."""
        is_partial = False
        for step in forward.steps:
            if step.awaits_end or (step.lane is None and step.stack.entries):
                step.abort()
                is_partial = True
            if step.lane is not None and not step.stack.is_checked:
                step.stack.forget_checks()
        if is_partial:
            self.partial_calls += 1
            self.setup.partial.add(self.branch)

    def _learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward that tells what the blocks take and return; it counts as a full step."""
        output = self.setup.learn(args, kwargs)
        self.lane_set = None
        lanes = self._take_lanes(args, kwargs)
        device = next(self.module.parameters(), torch.empty(0)).device
        forward = Forward({}, None, lanes, self.branch)
        for run, step in zip(lanes.runs, forward.steps, strict=True):
            run.plan(*self.num_steps())
            step.count_full(device)
        return output

    def _take_lanes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LaneSet:
        """Return the lanes of this request, taken from those of closed ones or made."""
        if self.lane_set is None:
            inputs = (*args, *kwargs.values())
            shape = next((x.shape for x in inputs if isinstance(x, torch.Tensor)), None)
            self.use(self.setup.take_lanes(shape))
        assert self.lane_set is not None
        return self.lane_set

    def use(self, lanes: LaneSet) -> None:
        """Go on with `lanes`, which no other request has."""
        self.lane_set = lanes
        lanes.start_request()

    # --- what the graph executor needs of a request ------------------------------------------

    def lanes(self) -> list[AnyLane]:
        """Return the lanes of the step under way."""
        runs = [] if self.lane_set is None else self.lane_set.runs
        lanes = [run.lanes.get(self.branch) for run in runs]
        return [lane for lane in lanes if lane is not None]

    def kind_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...]:
        """Return what the host reads of a call's tensors; recorded work holds for that alone."""
        runs = self._take_lanes(args, kwargs).runs
        sources = [run.source for run in runs if run.source is not None]
        return tuple(source.kind_of(self.module, args, kwargs) for source in sources)

    def copies(self) -> list[Restorable]:
        """Return copies of all that the step under way changes."""
        runs = [] if self.lane_set is None else self.lane_set.runs
        return [*map(LaneCopy, self.lanes()), *(SharedCopy(run.shared) for run in runs)]

    def _user_capture(self) -> UserCapture:
        """Return what records branches while the user captures a graph.

        Raises:
            RuntimeError: there are no lanes yet, which cannot be made inside a capture.
        """
        runs = [] if self.lane_set is None else self.lane_set.runs
        if not runs or any(run.stack.entries and self.branch not in run.lanes for run in runs):
            raise RuntimeError(
                f"{type(self.module).__name__}: a step must have run before one is captured, and "
                f"made the buffers, got none of branch {self.branch!r}; run one first"
            )
        assert self.lane_set is not None
        self.lane_set.is_captured = True
        capture = self.setup.user_capture()
        capture.fixed_by_plan = self.began_in_capture
        return capture

    # --- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Keep what the summary shows, and hand the lanes on to the next request."""
        if self.is_closed:
            return
        self.is_closed = True
        self.record = RequestRecord.of(self)
        lanes, self.lane_set = self.lane_set, None
        if lanes is not None:
            self.setup.lanes.give(lanes)

    @property
    def has_run(self) -> bool:
        """Whether it took steps, as far as the host can know."""
        return self.calls > 0 or (self.lane_set is not None and self.lane_set.is_captured)

    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return 0 if self.lane_set is None else self.lane_set.nbytes()

    def notes(self) -> list[str]:
        """Return what the summary should say beside the lanes."""
        notes = []
        if self.loops > 1:
            notes.append(f"the pipeline denoised {self.loops} times, the last time is shown")
        if self.partial_calls:
            notes.append(f"{self.partial_calls} calls left blocks out and ran without the cache")
        notes += [
            f"{count} steps were full since {why}" for why, count in self.forced.items() if count
        ]
        return notes
