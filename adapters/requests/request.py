"""One image or video on one transformer: its lanes, settings, plan, clock and statistics."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from threading import current_thread
from typing import Any

import torch
from torch.compiler import cudagraph_mark_step_begin

from dbcache.adapters.blocks.block_list import BlockList, Entry, Place
from dbcache.adapters.blocks.signature import Call
from dbcache.adapters.blocks.views import FORWARD, Shown
from dbcache.adapters.patching.instance_method import InstanceMethod
from dbcache.adapters.requests import clock as clocks
from dbcache.adapters.requests.clock import Clock, Steps
from dbcache.adapters.requests.context import ACTIVE, PLACE
from dbcache.adapters.requests.facts import meet_ranks
from dbcache.adapters.requests.lane_pool import LaneSet
from dbcache.adapters.requests.notices import Notices
from dbcache.adapters.requests.record import RequestRecord
from dbcache.adapters.requests.setup import Setup
from dbcache.adapters.signals.lora import CHANGED, Adapters
from dbcache.graphs.cuda_capture import UserCapture
from dbcache.graphs.fingerprint import has_own_graphs
from dbcache.graphs.recording import Cutter
from dbcache.lanes.lane_copy import AnyLane, StepCopy

_has_loop = asyncio._get_running_loop

ALL = object()
"""Stands for all branches."""


class Views:
    """Shows a model other blocks in its lists, for as long as any forward with a cache runs.

    Forwards overlap where threads share the model. As long as all see the same rows these lie in
    the lists' place; proxies of a forward without a cache then just call their blocks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forwards = 0
        self._shown: list[Shown] = []
        self._ends_generation = False

    def find_graphs(self, lists: Iterable[BlockList]) -> None:
        """Look for blocks that are compiled with CUDA graphs of their own.

        What their graphs return must live as long as the forward: they are told where one ends.
        """
        blocks = [block for block_list in lists for block in block_list.seen]
        self._ends_generation = any(map(has_own_graphs, blocks))
        if self._ends_generation:
            cudagraph_mark_step_begin()

    def show(self, over: Shown) -> None:
        """Let a forward that begins see its rows."""
        with self._lock:
            self._forwards += 1
            if not self._shown:
                self._shown.append(over)
                for own, name, row, _ in over.entries:
                    own[name] = row
            elif not any(one is over for one in self._shown):  # forwards see different rows
                self._shown.append(over)
                for own, name, _, view in (*self._shown[0].entries, *over.entries):
                    own[name] = view

    def hide(self) -> None:
        """Note that a forward has ended; the last one lets the model see its own lists again."""
        with self._lock:
            self._forwards -= 1
            if self._forwards < 1:
                self._forwards = 0
                for over in self._shown:
                    for own, name, _, _ in over.entries:
                        own.pop(name, None)
                self._shown.clear()
                if self._ends_generation:
                    cudagraph_mark_step_begin()


class Forward:
    """One forward of the transformer under way: the steps of all stacks, and what it sees."""

    __slots__ = ("cutter", "given", "inputs", "loops", "members", "rows", "runs", "steps")

    def __init__(
        self,
        rows: Mapping[Place, list[Entry]],
        cutter: Cutter | None,
        lanes: LaneSet,
        clock: Clock,
        members: list[Any] | None = None,
        given: tuple[Any, ...] = (),
    ) -> None:
        self.rows, self.loops = rows, clock.setup.loops
        self.given, self.inputs = given, clock.inputs
        self.cutter = cutter
        self.members = members
        self.runs = lanes.runs
        self.steps: list[Any] = []
        for run in lanes.runs:
            self.steps.append(run.stack.step(run.stack, run, clock.branch, self))


class Request:
    """One image or video on one transformer.

    Args:
        setup: the blocks and their settings, which requests share.
        steps: how many it has, where the caller knows; None: the config or a scheduler may tell.
        follows: guidance branches are found from the calls; see `Clock`.
        renew: returns the setup to go on with when the request begins anew by itself.

    Attributes:
        clock: tells which step and guidance branch a call is.
        lane_set: what the request keeps on the device; empty before its first step.
        record: what the summary shows of it, once it is closed.
        notices: what it says beside the lanes.
        part: attribute of the pipeline that holds the transformer, where it has several.
        hit: a step was cached, as far as the host knows.
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
        self.module = setup.module
        self.clock = Clock(setup, steps=steps, follows=follows)
        self.renew = renew
        self.is_closed = False
        self.record: RequestRecord | None = None
        self.lane_set = LaneSet([])
        self.sharded: Any = None
        self.notices, self.adapters = Notices(), Adapters()
        self.loops, self.part = 0, ""
        self.restart()

    @property
    def branch(self) -> str | None:
        """Guidance branch of the call under way."""
        return self.clock.branch

    def restart(self) -> None:
        """Forget all steps and branches: what comes is another image, or loop of a video."""
        self.loops += 1
        self.partial_calls = 0
        self.hit = False
        self.forced: Counter[str] = Counter()
        self.clock.restart(self.setup)
        self._start()

    def _start(self) -> None:
        self.clock.start()
        self.began_in_capture = clocks.is_capturing()
        self.lane_set.start_request()
        if self.setup.graphs is not None:
            self.setup.graphs.start_request()
        if self.setup.sharding is not None:
            self.sharded = self.setup.sharding.new_request()

    def start_loop(self) -> None:
        """A denoising loop begins; all but the first begin anew."""
        if self.clock.calls:
            self.restart()

    def move_to(self, setup: Setup) -> None:
        """Begin anew with another setup, within the same call of a pipeline."""
        self._give_lanes()
        self.setup = setup
        self.restart()

    def force_full(self, reason: str, branch: Any = ALL) -> None:
        """Make the next step of a branch, or of all, a full one; `reason` is for the summary."""
        runs, keys = self.lane_set.runs, set()
        for run in runs:
            keys |= {*run.lanes.copy()} if branch is ALL else {*run.keys_of(branch)}
        for key in keys:
            forgot = [run.forget(key) for run in runs]
            self.forced[reason] += any(forgot)

    def begin_step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], time: float | None = None
    ) -> None:
        """Begin anew where that is due, and find the branch of the call; `time` is its time."""
        clock = self.clock
        if clock.is_over(args, kwargs, time):
            self.notices.end_image(self)
            self.hit = False
            new = None if self.renew is None else self.renew()
            if new is not None and new is not self.setup:
                self.move_to(new)
            clock.refreshes = 0
            self._start()
        config = clock.config
        if clock.calls == config.force_refresh_step_hint and (
            clock.refreshes == 0 or config.force_refresh_step_policy == "repeat"
        ):
            clock.refreshes += 1
            self._start()
        if not self.lane_set.runs:
            self._take_lanes(args, kwargs)
        if clock.calls == 0:
            steps = clock.num_steps()
            meet_ranks(self.setup, steps, _latents(args, kwargs))
            self._plan(steps)
            self.notices.begin_image(self, args, kwargs)
        has_adapters = "peft_config" in self.module.__dict__ or self.adapters.are_known
        if has_adapters and self.adapters.have_changed(self.module, self.setup.lists, clock.calls):
            self.force_full(CHANGED)
        for reason in clock.find_branch(args, kwargs):
            self.force_full(reason, clock.branch)

    def _plan(self, steps: Steps) -> None:
        """Fit the plans of all lanes to the number of steps, as `Clock.num_steps` tells."""
        for run in self.lane_set.runs:
            run.plan(*steps)

    # --- forwards ---------------------------------------------------------------------------

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward with proxies in place of its blocks."""
        setup = self.setup
        if setup.spec.fills is not None and setup.spec.fills(kwargs):
            self.start_loop()
            return setup.original(*args, **kwargs)
        try:
            self.begin_step(args, kwargs)
            if self.sharded is None:
                output = self._step(args, kwargs)
            else:
                output = self.sharded(self.branch, lambda: self._step(args, kwargs))
        except BaseException:
            self.clock.branches.undo_call()
            raise
        clock = self.clock
        clock.end_call()
        if not self.hit and clock.branch_calls[clock.branch] == self.notices.last_step:
            self.notices.end_step(self)
        return output

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        setup, branch = self.setup, self.clock.branch
        if not setup.stacks:
            return self.learn(args, kwargs)
        if not self.lane_set.runs:  # another request learned the stacks
            self.take_lanes_anew(args, kwargs)
        cutter = _user_capture(self) if clocks.is_capturing() else None
        # a branch whose calls leave blocks out has no step that could be recorded
        if setup.graphs is not None and cutter is None and branch not in setup.partial:
            return setup.graphs.step(self, args, kwargs)
        return self.run(args, kwargs, cutter)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cutter: Cutter | None = None,
        members: list[Any] | None = None,
    ) -> Any:
        """Run one step with proxies in place of blocks, eagerly or while a `cutter` records it.

        `members`: whose the samples of the batch are, where they belong to several requests.
        """
        setup, lanes, shown = self.setup, self.lane_set, self.setup.shown
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
        forward = Forward(shown.rows, cutter, lanes, self.clock, members, (args, kwargs))
        try:
            FORWARD.set(forward)
            setup.views.show(shown)
            is_shown = True
            for run in lanes.runs:
                if cutter is not None:
                    run.stack.check_recordable(run.settings)
                if run.source is not None:
                    run.source.start(Call(self.module, args, kwargs), cutter is None)
            output, is_usual = setup.original(*args, **kwargs), True
            for step in forward.steps:
                self.hit |= step.cached
                if step.awaits_end or step.lane is None or not step.stack.is_checked:
                    is_usual = False
                    step.check_end()
                if step.watches_output:
                    step.on_output(output)
        except BaseException:
            if cutter is not None:
                cutter.abort()
            for step in forward.steps:
                step.abort()
            forward.steps.clear()
            raise
        finally:
            FORWARD.set(outer)
            if is_shown:
                setup.views.hide()
        if not is_usual:
            self._end_steps(forward)
        if cutter is None and (self.notices.may_rerun or torch.is_grad_enabled()):
            self.notices.end_forward(self, forward.steps, args, kwargs, output)
        forward.steps.clear()  # they hold activations, in a circle
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

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward that tells what the blocks take and return; it counts as a full step."""
        output = self.setup.learn(args, kwargs)
        lanes = self.take_lanes_anew(args, kwargs)
        forward = Forward({}, None, lanes, self.clock)
        for step in forward.steps:
            if step.stack.entries:  # else all of its blocks run on every step
                step.count_full(device_of(args, kwargs))
        return output

    def take_lanes_anew(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LaneSet:
        """Return lanes for stacks that have become known since the request began."""
        self._take_lanes(args, kwargs)
        self._plan(self.clock.num_steps())
        return self.lane_set

    def _take_lanes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take lanes from those of closed requests, or new ones."""
        self.lane_set = self.setup.take_lanes(getattr(_latents(args, kwargs), "shape", None))

    # --- what the graph executor needs of a request ------------------------------------------

    def lanes(self) -> list[AnyLane]:
        """Return the lanes of the step under way."""
        lanes = (run.lanes.get(self.branch) for run in self.lane_set.runs)
        return [lane for lane in lanes if lane is not None]

    def kind_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...]:
        """Return what the host reads of a call's tensors; recorded work holds for that alone."""
        sources = [run.source for run in self.lane_set.runs if run.source is not None]
        return tuple(source.kind_of(Call(self.module, args, kwargs)) for source in sources)

    def copies(self) -> list[StepCopy]:
        """Return copies of all that the step under way changes."""
        lanes = [StepCopy(lane.steps, lane.tensors) for lane in self.lanes()]
        changes = [run.shared for run in self.lane_set.runs]
        return lanes + [StepCopy(change, change.tensors) for change in changes]

    # --- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Keep what the summary shows, and hand the lanes on to the next request."""
        if self.is_closed:
            return
        self.is_closed = True
        self.record = RequestRecord.of(self)
        self.notices.close(self, self.record)
        self._give_lanes()

    def _give_lanes(self) -> None:
        """Hand the lanes on to the next request."""
        lanes, self.lane_set = self.lane_set, LaneSet([])
        if lanes.runs:
            self.setup.lanes.give(lanes)

    @property
    def has_run(self) -> bool:
        """Whether it took steps, as far as the host can know."""
        return self.clock.calls > 0 or self.lane_set.is_captured

    def shown(self) -> RequestRecord:
        """Return the record as it stands, for any thread; that of the end where it came to it."""
        record = RequestRecord.of(self)
        return self.record or record


def _latents(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the first tensor of a call."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)


def device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return where a call computes; offloaded weights lie elsewhere, or are of "meta"."""
    latents = _latents(args, kwargs)
    return torch.device("cpu") if latents is None else latents.device


def _user_capture(request: Request) -> UserCapture:
    """Return what records branches while the user captures a graph.

    Raises:
        RuntimeError: there are no lanes yet, which cannot be made inside a capture.
    """
    runs = request.lane_set.runs
    if not runs or any(run.stack.entries and request.branch not in run.lanes for run in runs):
        raise RuntimeError(
            f"{type(request.module).__name__}: a step must have run before one is captured, and "
            f"made the buffers, got none of branch {request.branch!r}; run one first"
        )
    request.lane_set.is_captured = True
    setup = request.setup
    capture = setup.capture or UserCapture(next(setup.module.parameters()).device)
    setup.capture = capture
    capture.fixed_by_plan = request.began_in_capture
    return capture


class CachedForward(InstanceMethod):
    """The forward of a transformer, with the cache where the call belongs to a request.

    Args:
        handle: the `CachedTransformer`.
    """

    def __init__(self, handle: Any) -> None:
        super().__init__(handle.module, "forward", self._find_and_run)
        self._handle = handle
        self._key = id(handle.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.call is None or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        if torch._C._current_graph_task_id() >= 0:  # autograd runs it again
            return self._handle.reruns.run(type(self.module).__name__, args, kwargs)
        request = ACTIVE.get().get(self._key)
        if type(request) is not Request or request.is_closed:
            place, request = PLACE.get(), None
            is_here = place is not None and place.task is None and not _has_loop()
            if place is not None and is_here and place.thread() is current_thread():
                request = self._handle.implicit.get(place)
            if request is None:
                return self._find_and_run(*args, **kwargs)
        return request.forward(args, kwargs)

    def run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        self._handle.compiled.follow_caller()
        return super().run_uncompiled(*args, **kwargs)

    def _find_and_run(self, *args: Any, **kwargs: Any) -> Any:
        request = self._handle.current()
        run = self._handle.run_plain if request is None else request.forward
        return run(args, kwargs)
