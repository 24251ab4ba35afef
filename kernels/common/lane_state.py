"""The packed scalar state of one lane: a few tiny tensors on the lane's device.

A lane is one stream of denoising steps with a cache of its own. Everything that `decide` knows
about it is in four tensors (`counters`, `values`, `limits`, `thresholds`), the plan, and two traces
that are read back once per request. The constants below name their entries.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dbcache.kernels.common.constants import Constants

MAX_SLOTS = 8
"""Largest number of snapshots a ring can hold."""

# entries of LaneState.counters, int32
STEP = 0  # index of the next step of this request
CACHED = 1  # decision of the latest step: 1 cached, 0 full
REASON = 2  # Reason of the latest step
CACHED_STEPS = 3  # cached steps so far in this request
CONSECUTIVE = 4  # cached steps since the last full one
REFERENCE = 5  # 0 none, 1 valid, 2 lost because shape or dtype changed
SNAPSHOTS = 6  # ring slots that hold a snapshot
HEAD = 7  # ring slot that the next full step will write
SLOT = 8  # ring slot that commit writes in this step
RING_STEPS = 9  # MAX_SLOTS entries: the step at which each slot was written
TICKET = RING_STEPS + MAX_SLOTS  # programs of a launch that are done; 0 between launches
NUM_COUNTERS = TICKET + 1

# entries of LaneState.values, float32
DIFF = 0  # relative L1 of the latest step, -1 where it was not measured
ACCUMULATED = 1  # sum of the diffs of cached dynamic steps since the last full step
RATE = 2  # for Signal.RATE; below 0 where there is none yet, one of the two below
WEIGHTS = 4  # MAX_SLOTS entries, by ring slot, for hidden states; at a multiple of 16 bytes
ENCODER_WEIGHTS = WEIGHTS + MAX_SLOTS  # the same for encoder hidden states
NUM_VALUES = ENCODER_WEIGHTS + MAX_SLOTS
NO_OUTPUT = -1.0  # no output of a full step is kept
ONE_OUTPUT = -2.0  # the output of one full step is kept

# entries of LaneState.limits, int32
MAX_CACHED = 0  # most cached steps per request, -1 for no limit
MAX_CONSECUTIVE = 1  # most cached steps in a row, -1 for no limit
SLOTS = 2  # ring slots in use, 1 to MAX_SLOTS
ORDER = 3  # order of the prediction of hidden states, 0 reuses the latest snapshot
ENCODER_ORDER = 4  # the same for encoder hidden states
BATCH_REDUCE = 5  # a BatchReduce
PREDICTOR = 6  # a Predictor
SIGNAL = 7  # a Signal
NUM_LIMITS = 8

# entries of LaneState.thresholds, float32
THRESHOLD = 0  # cache below this; <= 0 never, >= 1 always (Signal.CHANGE only)
MAX_ACCUMULATED = 1  # run in full once ACCUMULATED reaches this; <= 0 for no limit
IMPORTANT = 2  # a token counts above this relative L1, if tokens are measured one by one
SCALE = 3  # of the predictor; see `taylor`
POLYNOMIAL = 4  # DEGREE + 1 coefficients of Signal.SUM, that of the highest power first
DEGREE = 4
NUM_THRESHOLDS = POLYNOMIAL + DEGREE + 1

KNOWN = 16
"""In a plan, ``KNOWN + reason``: the step was decided before the request began, by this `Reason`. A
cached one is a full one all the same where there is no reference."""


class PlanCode(IntEnum):
    """What the schedule says about a step before the loop starts."""

    DYNAMIC = 0
    """Measure, then decide."""
    STATIC = 1
    """Cache without measuring."""
    WARMUP = 2
    """Run in full: the step belongs to the warm-up."""
    MASK = 3
    """Run in full: the step mask says so."""


class BatchReduce(IntEnum):
    """How the changes of a batch's samples become the one that is compared with the threshold."""

    MEAN = 0
    """Of the batch as a whole: the sums of all samples, divided."""
    MAX = 1
    """Of the sample that changed most."""


class Signal(IntEnum):
    """What a measurement contributes, and whether its sum is compared; see `step_signal`."""

    CHANGE = 0
    """The relative L1, compared by itself."""
    SUM = 1
    """A polynomial of the relative L1, summed since the last full step."""
    RATE = 2
    """The sum of the differences times `RATE`, summed since the last full step."""


class Predictor(IntEnum):
    """How the weights follow from the steps in the ring; see `taylor`."""

    TAYLOR = 0
    NEWTON = 1
    HERMITE = 2
    FOCA = 3


class Reason(IntEnum):
    """Why a step ran in full or cached; those from `STATIC` on are cached steps."""

    WARMUP = 0
    MASK = 1
    COUNT_LIMIT = 2
    CONSECUTIVE_LIMIT = 3
    ACCUMULATED_LIMIT = 4
    NO_REFERENCE = 5
    SHAPE_CHANGED = 6
    THRESHOLD_OFF = 7
    """The threshold is <= 0."""
    NAN = 8
    ABOVE_THRESHOLD = 9
    STATIC = 10
    BELOW_THRESHOLD = 11
    THRESHOLD_ALWAYS = 12
    """The threshold is >= 1."""

    @property
    def cached(self) -> bool:
        """Whether a step with this reason is a cached one."""
        return self >= FIRST_CACHED


FIRST_CACHED = Reason.STATIC
PLANNED = {KNOWN + reason: reason for reason in Reason} | {
    PlanCode.STATIC: Reason.STATIC,
    PlanCode.WARMUP: Reason.WARMUP,
    PlanCode.MASK: Reason.MASK,
}
"""What the plan codes say; those that cache do if there is a reference. DYNAMIC says nothing."""

LANE = Constants(globals())
"""The constants above, for kernels; the next ones are the members of the enumerations."""
PLANS, REASONS = Constants(PlanCode.__members__), Constants(Reason.__members__)
SIGNALS, PREDICTORS = Constants(Signal.__members__), Constants(Predictor.__members__)
REDUCTIONS = Constants(BatchReduce.__members__)


class State(NamedTuple):
    """The tensors of a `LaneState` inside a kernel, made of the kernel's arguments."""

    counters_ptr: Any
    values_ptr: Any
    limits_ptr: Any
    thresholds_ptr: Any
    plan_ptr: Any
    trace_reason_ptr: Any
    trace_diff_ptr: Any
    capacity: Any


Numbers = Sequence[Any]
"""On the host: counters, values, limits and thresholds of a lane, then whatever its state has."""

Own = TypeVar("Own", bound="LaneState")


@functools.cache
def _getter_of(kind: Any) -> Any:
    return operator.attrgetter(*(x.name for x in fields(kind) if x.init))


@dataclass(slots=True, eq=False)
class LaneState:
    """The tensors of one lane, all on one device, contiguous. Make one with `allocate`."""

    counters: Tensor
    """int32 (NUM_COUNTERS,)"""
    values: Tensor
    """float32 (NUM_VALUES,)"""
    limits: Tensor
    """int32 (NUM_LIMITS,), written by the host when the configuration changes"""
    thresholds: Tensor
    """float32 (NUM_THRESHOLDS,), written by the host when the configuration changes"""
    plan: Tensor
    """int32 (capacity,): a PlanCode per step, or KNOWN + its Reason"""
    trace_reason: Tensor
    """int32 (capacity,): a Reason per step, -1 where the request has not come yet"""
    trace_diff: Tensor
    """float32 (capacity,): relative L1 per step, -1 where it was not measured"""
    weights: Tensor = field(init=False)
    """float32 (MAX_SLOTS,), a view of `values`: what `predict` takes for hidden states"""
    encoder_weights: Tensor = field(init=False)
    """float32 (MAX_SLOTS,), a view of `values`: what `predict` takes for encoder states"""

    host: tuple[Any, ...] | None = field(init=False)
    """Memoryviews of the tensors, in the order of `tensors`, on the CPU; None elsewhere"""
    _reset: tuple[list[Tensor], list[Tensor]] = field(init=False, repr=False)
    """What a request writes, and what that is when it begins, as int32: for `reset`"""
    _arguments: tuple[int, ...] | None = field(init=False, repr=False)
    """What `arguments` returns, None where it is not known yet"""
    partials: Tensor | None = field(init=False, repr=False)
    """float32, the partial sums of `probe_and_decide`; made when they are first taken"""
    _outgrown: list[Tensor] = field(init=False, repr=False)
    """Former `partials`, which captured graphs may still write to"""
    size: tuple[Any, int, list[float]] | None = field(init=False, repr=False)
    """A probe residual, by a weak reference, its version, and its size, of the reference's path"""

    def __post_init__(self) -> None:
        self.partials, self._outgrown, self.size = None, [], None
        self._make_views()

    def _make_views(self) -> None:
        self._arguments = None
        # a fake tensor claims to be on the CPU, but has no memory
        on_cpu = self.counters.device.type == "cpu" and type(self.counters) is Tensor
        self.host = tuple(x.numpy().data for x in self.tensors()) if on_cpu else None
        self.weights = self.values[WEIGHTS : WEIGHTS + MAX_SLOTS]
        self.encoder_weights = self.values[ENCODER_WEIGHTS : ENCODER_WEIGHTS + MAX_SLOTS]

    @classmethod
    def allocate(cls, capacity: int, device: torch.device | str) -> "LaneState":
        """Return the state of a new request of at most `capacity` steps.

        Until they are written, the limits are off, the ring has one slot, the orders are 0, the
        batch counts as a whole, the threshold is 0 (never cache), and each step of the plan is
        `PlanCode.DYNAMIC`.
        """
        if capacity < 1:
            raise ValueError(f"LaneState.allocate: capacity must be at least 1, got {capacity}")
        counters, values, *traces = _blank(capacity, device)
        off = [-1, -1, 1, 0, 0, BatchReduce.MEAN, Predictor.TAYLOR, Signal.CHANGE]
        limits = torch.tensor(off, dtype=torch.int32, device=device)
        thresholds = torch.zeros(NUM_THRESHOLDS, dtype=torch.float32, device=device)
        plan = torch.full((capacity,), PlanCode.DYNAMIC, dtype=torch.int32, device=device)
        return cls(counters, values, limits, thresholds, plan, *traces)._with_reset()

    def _with_reset(self: Own) -> Own:
        """Allocate what `reset` copies: a graph may capture the copy, but not the allocation."""
        written = (self.counters, self.values, self.trace_reason, self.trace_diff)
        blank = _blank(self.capacity, self.counters.device)
        # PyTorch copies tensors of one dtype in one launch
        self._reset = [x.view(torch.int32) for x in written], [x.view(torch.int32) for x in blank]
        return self

    @property
    def capacity(self) -> int:
        """Number of steps that the plan and the traces can hold."""
        return self.plan.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that the state is made of, in the order of the fields."""
        kind: Any = type(self)
        tensors: tuple[Tensor, ...] = _getter_of(kind)(self)
        return tensors

    def arguments(self) -> tuple[int, ...]:
        """Return the addresses of the tensors and the capacity, as kernels take them."""
        if self._arguments is None:
            self._arguments = (*self.addresses(), self.capacity)
        return self._arguments

    def room_for(self, size: int) -> Tensor:
        """Return `partials` with room for `size` numbers. They live as long as the state."""
        if self.partials is None or self.partials.numel() < size:
            self._outgrown += [] if self.partials is None else [self.partials]
            device = self.counters.device
            self.partials = torch.empty(size, dtype=torch.float32, device=device)
        return self.partials

    def addresses(self) -> tuple[int, ...]:
        """Return the tensors' addresses: captured work is valid while they stay the same."""
        return tuple(tensor.data_ptr() for tensor in self.tensors())

    def reset(self) -> None:
        """Start a new request: forget all but the plan and the limits.

        One launch on a GPU, in place. Does not synchronise.
        """
        torch._foreach_copy_(*self._reset)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` steps; existing entries stay, new steps are DYNAMIC.

        `plan`, `trace_reason` and `trace_diff` become new tensors. Does not synchronise.
        """
        extra = capacity - self.capacity
        if extra <= 0:
            return
        pad = torch.nn.functional.pad
        self.plan = pad(self.plan, (0, extra), value=int(PlanCode.DYNAMIC))
        self.trace_reason = pad(self.trace_reason, (0, extra), value=-1)
        self.trace_diff = pad(self.trace_diff, (0, extra), value=-1.0)
        self._make_views()
        self._with_reset()

    def invalidate(self) -> None:
        """Forget the reference and the snapshots: their shape or dtype no longer fits.

        The step, the counts, the plan and the traces stay. Does not synchronise.
        """
        self.counters[REFERENCE : REFERENCE + 1].fill_(2)
        self.counters[SNAPSHOTS : HEAD + 1].zero_()
        self.values[RATE : RATE + 1].fill_(NO_OUTPUT)

    def clone(self: Own, device: torch.device | str | None = None) -> Own:
        """Return a copy with tensors of its own, on `device` if one is given."""
        tensors = (x.to(device or x.device, copy=True) for x in self.tensors())
        return type(self)(*tensors)._with_reset()

    def __deepcopy__(self, memo: object) -> "LaneState":
        return self.clone()

    def copy_(self: Own, other: Own) -> None:
        """Copy the contents of a state of the same kind and capacity."""
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(its)


DECIDED = ("counters", "values", "trace_reason", "trace_diff")
"""Names of the tensors that the decision of a step writes."""
TENSORS = tuple(tensor.name for tensor in fields(LaneState) if tensor.init)
"""Names of the tensors that a `LaneState` is made of."""


def _blank(capacity: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """Return counters, values and the two traces of a request that has not begun."""
    values = torch.zeros(NUM_VALUES, dtype=torch.float32, device=device)
    values[DIFF], values[RATE] = -1.0, NO_OUTPUT
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    reasons = torch.full((capacity,), -1, dtype=torch.int32, device=device)
    return counters, values, reasons, reasons.float()


def steps_newest_first(counters: Sequence[int], slots: int) -> list[int]:
    """Return the steps of the snapshots in the ring, newest first."""
    newest = counters[HEAD] - 1
    return [counters[RING_STEPS + (newest - m) % slots] for m in range(counters[SNAPSHOTS])]


def spread(weights: Sequence[float], head: int, slots: int) -> list[float]:
    """Return `weights` of the newest snapshots, newest first, by ring slot, and 0 for the rest."""
    by_slot = [0.0] * MAX_SLOTS
    for m, weight in enumerate(weights):
        by_slot[(head - 1 - m) % slots] = weight
    return by_slot


def write_weights(into: Tensor, weights: Sequence[float], head: int, slots: int) -> None:
    """Write `weights`, as `spread` lays them out, to those of a state."""
    into.copy_(torch.tensor(spread(weights, head, slots), dtype=into.dtype, device="cpu"))
