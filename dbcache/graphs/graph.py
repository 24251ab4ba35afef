"""The graph executor: a forward recorded once per kind of call, then replayed.

The first call of a kind (shapes, dtypes, other arguments, guidance branch) runs eagerly, which also
compiles and tunes what needs it. The second is recorded: as segments that the host strings together
("host"), or as one CUDA graph with the branches inside ("device"). Each recording is tried: a full,
a cached and a dynamic step, run eagerly before it and replayed after it on the same state, must
agree. What cannot be recorded runs eagerly, and says so.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from operator import is_
from time import perf_counter
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from dbcache.config.options import check_choice, check_flag, check_int, check_number
from dbcache.graphs.arguments import Structure, flatten, unflatten
from dbcache.graphs.cuda_capture import RECORDERS
from dbcache.graphs.cuda_driver import find_driver
from dbcache.graphs.fingerprint import fingerprint, reason_against
from dbcache.graphs.recording import Recordable, Replay, SegmentCutter, replay_of
from dbcache.graphs.trial import compare, run_trial
from dbcache.graphs.turns import Turns
from dbcache.lanes.lane_copy import AnyLane
from dbcache.notices import say

MODES = ("device", "host")
"""From best to last resort."""

CAPACITY = 1024
"""Steps that a lane gets room for before it is recorded, at least half of them ahead: to grow later
means to record anew."""


@dataclass(frozen=True)
class GraphOptions:
    """How to record.

    Attributes:
        mode: "device", "host", or "auto": the best that works, stepping down with a warning.
        static_outputs: return the recording's own tensors, which the next step overwrites.
        max_recordings: recordings that are kept; one more gives all of them up.
        max_gigabytes: the same for the memory (1e9 bytes) of their pool.
    """

    mode: str = "auto"
    static_outputs: bool = False
    max_recordings: int = 16
    max_gigabytes: float = 16.0

    def __post_init__(self) -> None:
        check_choice("cuda_graph", self.mode, ("auto", *MODES))
        check_flag("cuda_graph: static_outputs", self.static_outputs)
        check_int("cuda_graph: max_recordings", self.max_recordings, 1)
        check_number("cuda_graph: max_gigabytes", self.max_gigabytes, positive=True)

    @classmethod
    def of(cls, given: bool | str | GraphOptions) -> GraphOptions | None:
        """Return what `enable` was given as options, None for no graphs.

        Raises:
            ValueError, TypeError: it is none of those.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, bool):
            return cls() if given else None
        return cls(str(given))


class Home:
    """A lane and the tensors that a recording found in it."""

    def __init__(self, lane: AnyLane) -> None:
        self.lane = lane
        self.state = lane.state.addresses()
        self.layout: Any = lane.layout
        self.stored = lane.stored()

    def fits(self) -> bool:
        """Whether the lane's state still lies where it was, and has room for one more step."""
        lane = self.lane
        return self.state == lane.state.addresses() and lane.steps.step < len(lane.steps.plan)

    def move_in(self) -> None:
        """Give the lane back the buffers of the recording, where others came in between."""
        lane = self.lane
        if lane.layout == self.layout:
            if all(map(is_, lane.stored(), self.stored)):
                return
            lane.forget_reference()  # eager steps went on after other shapes, with other tensors
        lane.take(self.layout, self.stored)


@dataclass
class Recording:
    """One recorded forward.

    Attributes:
        name: kind of call, for people.
        replay: does a step's work on what `inputs` hold.
        inputs: the tensors that it reads.
        outputs: the leaves of what it returns.
        structure: how the leaves make the output.
        homes: the lanes, and where their tensors lay.
        owner: the set of these lanes.
        seconds: what it took to record and to try it.
    """

    name: str
    replay: Replay
    inputs: list[torch.Tensor]
    outputs: list[Any]
    structure: Any
    homes: list[Home]
    owner: weakref.ref[Any]
    seconds: float = 0.0

    def __call__(self, tensors: list[torch.Tensor]) -> None:
        """Do one step on `tensors`; the outputs then hold its results."""
        for home in self.homes:
            home.move_in()
        if tensors:
            torch._foreach_copy_(self.inputs, tensors)
        before = [home.lane.steps.step for home in self.homes]
        try:
            self.replay()
        except BaseException:
            for home, step in zip(self.homes, before, strict=True):
                home.lane.rewind(step)
            raise


class GraphExecutor:
    """Records and replays the forwards of one transformer.

    A recording belongs to the lanes on which it was made, and so to one request at a time. Requests
    that overlap have recordings of their own, as far as `max_recordings` allows; beyond, they run
    eagerly. They take turns: one step is replayed or recorded at a time.

    Args:
        module: the transformer.
        options: how to record.
    """

    def __init__(self, module: torch.nn.Module, options: GraphOptions) -> None:
        self.module = module
        self.options = options
        self._lock = threading.RLock()
        self._turns = Turns()
        self.recordings: dict[Any, Recording] = {}
        self.reasons: Counter[str] = Counter()
        self.retired = 0
        self.replays = 0
        self._modes = list(MODES) if options.mode == "auto" else [options.mode]
        self._failure = ""
        self._seen: dict[Any, Any] = {}
        self._recorder: Any = None
        self._fingerprint: int | None = None

    @property
    def is_settled(self) -> bool:
        """Whether all kinds of calls that came are recorded, or it is known why they are not."""
        knows = bool(self.recordings or self.reasons)
        return knows and self._seen.keys() <= self.recordings.keys()

    def describe(self) -> list[str]:
        """Return what was recorded, and why calls ran eagerly, a line each."""
        lines = []
        with self._lock:
            recordings = self.recordings.values()
            if recordings:
                seconds = sum(recording.seconds for recording in recordings)
                kinds = "; ".join(recording.name for recording in recordings)
                lines.append(
                    f"{self.replays} steps replayed, {len(recordings)} recordings ({kinds}) in "
                    f"{seconds:.1f} s and {self._recorder.nbytes() / 1e9:.2f} GB"
                )
            if self.retired:
                lines.append(f"{self.retired} recordings were given up")
            lines += [f"{reason} ({n} times)" for reason, n in self.reasons.items()]
        return [f"cuda_graph: {line}" for line in lines]

    def start_request(self) -> None:
        """Give recordings up that no longer hold for the weights, or whose lanes are gone."""
        with self._lock:
            for key in [key for key, one in self.recordings.items() if one.owner() is None]:
                self.recordings.pop(key).replay.close()
            if self.recordings and self._fingerprint != fingerprint(self.module):
                self.retire()

    def retire(self) -> None:
        """Give all recordings up, with their memory and their stream."""
        with self._lock:
            for recording in self.recordings.values():
                recording.replay.close()
            self.retired += len(self.recordings)
            self.recordings.clear()
            self._seen.clear()
            if self._recorder is not None:
                self._recorder.close()
                self._recorder = None

    def step(self, request: Recordable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do one step of a request: replayed where it can be, else eagerly."""
        leaves, structure = flatten(args, kwargs)
        tensors = _tensors(leaves)
        key = (*_key(request, leaves, structure), request.kind_of(args, kwargs))
        with self._lock, self._turns(tensors):
            try:
                recording = self.recordings.get(key)
            except TypeError as error:
                self._give_up(f"the other arguments must be hashable, got {error}")
                return request.run(args, kwargs)
            if recording is not None and not all(home.fits() for home in recording.homes):
                self.retire()
                recording = None
            if recording is None and self._is_due(request, key, tensors):
                recording = self._record(request, leaves, structure)
                if recording is not None:
                    self.recordings[key] = recording
            if recording is not None:
                recording(tensors)
                self.replays += 1
                outputs = recording.outputs
                if not self.options.static_outputs:
                    outputs = _cloned(outputs)
                return tree_unflatten(outputs, recording.structure)
        output = request.run(args, kwargs)
        with self._lock:
            if key in self._seen:
                self._seen[key] = _layouts(request)
        return output

    def _is_due(self, request: Recordable, key: Any, tensors: list[torch.Tensor]) -> bool:
        """Whether to record now: the call is recordable, and it is not the first of its kind.

        Nor is it the first one after calls of other shapes within a request: the lanes then start
        anew, which is not to be recorded.
        """
        reason = self._reason_against(tensors)
        if reason is not None:
            self._give_up(reason)
            return False
        is_due = self._seen.get(key) == _layouts(request)
        self._seen[key] = None
        return is_due

    def _reason_against(self, tensors: list[torch.Tensor]) -> str | None:
        if not self._modes:
            return self._failure
        if torch.is_grad_enabled():
            return "gradients must be off (torch.no_grad or torch.inference_mode)"
        # the first weight shows where the module lies
        devices = {x.device for x in (*tensors, *islice(self.module.parameters(), 1))}
        if len(devices) != 1 or next(iter(devices)).type not in RECORDERS:
            names = ", ".join(sorted(map(str, devices)))
            return f"weights and inputs must lie on one GPU, got {names}"
        return None

    def _give_up(self, reason: str) -> None:
        """Run this call eagerly and say why, the first time; unless a mode was asked for by name.

        Raises:
            RuntimeError: it was.
        """
        if self.options.mode != "auto":
            raise RuntimeError(f"cuda_graph={self.options.mode!r} is impossible here: {reason}")
        if not self.reasons[reason]:
            say(f"dbcache: cuda_graph: runs eagerly: {reason}")
        self.reasons[reason] += 1

    def _record(
        self, request: Recordable, leaves: list[Any], structure: Structure
    ) -> Recording | None:
        """Return a recording that was tried, None if none can be had."""
        reason = reason_against(self.module)
        if reason is not None:
            self._give_up(reason)
            return None
        others = [one for one in self.recordings.values() if one.owner() is not request.lane_set]
        if others and len(self.recordings) >= self.options.max_recordings:
            self.reasons["requests at the same time have all max_recordings recordings"] += 1
            return None
        while self._modes:
            mode = self._modes[0]
            try:
                self._make_room(mode)
                return self._record_as(mode, request, leaves, structure)
            except RuntimeError as error:
                self._recorder = None  # of a stream that nothing goes on with
                self.retire()
                said = f"cuda_graph={mode!r} is impossible here"
                if self.options.mode != "auto":
                    raise RuntimeError(f"{said}: {error}") from error
                self._modes.pop(0)
                then = f"goes on with {self._modes[0]!r}" if self._modes else "runs eagerly"
                self._failure = f"{mode!r} failed: {error}"
                self.reasons[self._failure] += 1
                say(f"dbcache: {said} and {then}: {error}")
        return None

    def _make_room(self, mode: str) -> None:
        """See to a recorder with room for one more recording, and to the driver."""
        options, recorder = self.options, self._recorder
        if recorder is not None and (
            len(self.recordings) >= options.max_recordings
            or recorder.nbytes() > options.max_gigabytes * 1e9
        ):
            self.retire()
        if self._recorder is None:
            device = next(self.module.parameters()).device
            driver, why = find_driver()
            if driver is None and mode == "device":
                raise RuntimeError(why)
            self._recorder = RECORDERS[device.type](device, driver)
            self._fingerprint = fingerprint(self.module)

    def _record_as(
        self, mode: str, request: Recordable, leaves: list[Any], structure: Structure
    ) -> Recording:
        """Return a recording whose steps were compared with eager ones.

        Raises:
            RuntimeError: they differ, or the step draws random numbers.
        """
        start, recorder = perf_counter(), self._recorder
        for lane in request.lanes():
            # the same for all kinds that are recorded early on: growing voids what was recorded
            lane.steps.reserve(CAPACITY * (1 + 2 * lane.steps.step // CAPACITY))

        def eager(values: list[Any]) -> list[Any]:
            return tree_flatten(request.run(*unflatten(values, structure)))[0]

        random = recorder.random_state()
        # first of all: it also compiles, tunes and loads what is to be recorded
        expected = run_trial(request, leaves, eager)
        if recorder.random_state() != random:
            raise RuntimeError("a step must not draw random numbers, which would be repeated")
        recording = self._capture(mode, request, leaves, structure)

        def replayed(values: list[Any]) -> list[Any]:
            recording(_tensors(values))
            return _cloned(recording.outputs)

        compare(run_trial(request, leaves, replayed), expected)
        recording.seconds = perf_counter() - start
        return recording

    def _capture(
        self, mode: str, request: Recordable, leaves: list[Any], structure: Structure
    ) -> Recording:
        """Record one step."""
        recorder, lanes = self._recorder, request.lanes()
        with torch.inference_mode(False):
            static = _cloned(leaves)
        knew = [lane.steps.has_reference for lane in lanes]
        with recorder.capturing():
            cutter = SegmentCutter(recorder)
            try:
                output = request.run(*unflatten(static, structure), cutter)
                cutter.finish()
            except BaseException:
                cutter.abort()
                raise
            finally:
                for lane, had_reference in zip(lanes, knew, strict=True):
                    lane.steps.has_reference = had_reference
        replay = replay_of(cutter.program, mode, recorder, lanes)
        inputs = _tensors(static)
        name = _name(replay.mode, inputs, request.branch)
        homes, owner = [*map(Home, lanes)], weakref.ref(request.lane_set)
        return Recording(name, replay, inputs, *tree_flatten(output), homes, owner)


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [x for x in leaves if isinstance(x, torch.Tensor)]


def _cloned(leaves: list[Any]) -> list[Any]:
    """Return copies of the tensors, and all else as it is."""
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]


def _layouts(request: Recordable) -> list[Any]:
    return [lane.layout for lane in request.lanes()]


def _key(request: Recordable, leaves: list[Any], structure: Structure) -> tuple[Any, ...]:
    """Return what must be the same for a recording to serve."""
    kinds = tuple(
        (leaf.shape, leaf.dtype, leaf.device)
        if isinstance(leaf, torch.Tensor)
        else (type(leaf), leaf)
        for leaf in leaves
    )
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    modes = (torch.is_inference_mode_enabled(), autocast)
    return (request.lane_set.serial, request.branch, structure, kinds, modes)


def _name(mode: str, inputs: list[torch.Tensor], branch: str | None) -> str:
    """Return the name of a recording, for people."""
    nothing = torch.empty(0, dtype=torch.float32, device="cpu")
    largest = max(inputs, key=torch.Tensor.numel, default=nothing)
    shape, dtype = "x".join(map(str, largest.shape)), str(largest.dtype).removeprefix("torch.")
    return f"{mode}, {shape} {dtype}" + (f", {branch}" if branch else "")
