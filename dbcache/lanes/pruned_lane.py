"""One lane of DBPrune: what is stored of each block, and which blocks of a step are left out.

All decisions are taken on the device. The host reads which blocks are left out, once per step;
where plan, limits or a missing reference say it, it knows by the same rules, and reads nothing.

Memory per lane: two tensors of the size of `hidden_states` per block between the first and the last
one that may be left out, and one of the size of `encoder_hidden_states` where blocks return them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from dbcache.config.cache import StackSettings
from dbcache.config.prune import DBPruneConfig
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import PlanCode, Reason
from dbcache.kernels.decision.decide import choose
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.add_residuals import add_residuals
from dbcache.kernels.pruning.block_changes import block_changes
from dbcache.kernels.pruning.block_state import BlockState, BlockSteps
from dbcache.kernels.pruning.decide_blocks import decide_blocks
from dbcache.kernels.pruning.store_block import store_block
from dbcache.lanes.lane import FIRST_CAPACITY, HostCopy, Layout, outside_inference_mode
from dbcache.lanes.plan import make_plan
from dbcache.lanes.sharding import Sharding


class BlockCache:
    """What is stored of a run of blocks.

    Args:
        prunable: which of them may be left out.
        rule: the numbers of `block_state` that `decide_blocks` goes by.
        device: of the blocks.

    Attributes:
        rule: those numbers on the device, in one tensor for the states of all layouts.
        state: what is stored; None until the first block is.
    """

    @outside_inference_mode
    def __init__(
        self, prunable: Sequence[bool], rule: Sequence[float], device: torch.device
    ) -> None:
        self.prunable = list(prunable)
        self.rule = torch.tensor(rule, dtype=torch.float32, device=device)
        self.state: BlockState | None = None
        self._host = HostCopy()

    def write_rule(self, rule: Sequence[float]) -> None:
        """Go by other numbers from now on."""
        self.rule.copy_(torch.tensor(rule, dtype=torch.float32))

    def move(self, device: torch.device) -> None:
        """Take the rule along to another device; what is stored is dropped."""
        self.rule = self.rule.to(device)
        self.state, self._host = None, HostCopy()

    def buffers_by_name(self) -> dict[str, torch.Tensor | None]:
        """Return the tensors of what is stored."""
        if self.state is None:
            return {}
        return {field.name: getattr(self.state, field.name) for field in fields(self.state)}

    def take_buffers(self, buffers: dict[str, Any]) -> None:
        """Go on with what is stored of tensors of another layout, or with nothing."""
        self.state = BlockState(**buffers) if buffers else None

    def measure(self, h: torch.Tensor) -> torch.Tensor:
        """Return the partial sums of how much each block's input changed, given the first one's."""
        assert self.state is not None
        return block_changes(h, self.state.inputs, self.state.residuals, self.state.stamps)

    def choose(self, partials: torch.Tensor, sharding: Sharding | None = None) -> torch.Tensor:
        """Return (M, 2) of the device: the changes, and which blocks may be left out by them.

        Args:
            partials: what `measure` gave.
            sharding: ranks that each have a part of the tokens decide alike, by one message.
        """
        assert self.state is not None
        state = self.state
        if sharding is not None:
            blocks, samples = partials.shape[:2]
            sums = torch.cat([partials.sum(2).flatten(0, 1), state.growth_sums.sum(1)])
            sums = sharding.vote(sums[:, None], per_sample=True)
            partials = sums[: blocks * samples].unflatten(0, (blocks, samples))
            state = replace(state, growth_sums=sums[blocks * samples :])
        decide_blocks(partials, state)
        return state.decisions

    def read(self, flags: torch.Tensor) -> list[bool]:
        """Return on the host which blocks are left out. The only host wait of a step."""
        return [bool(flag) for flag in self._read(flags).tolist()]

    def _read(self, flags: torch.Tensor) -> torch.Tensor:
        return self._host.read(flags) if flags.is_cuda else flags

    def store(
        self,
        index: int,
        due: torch.Tensor,
        h_in: torch.Tensor,
        h_out: torch.Tensor,
        encoder_in: torch.Tensor | None,
        encoder_out: torch.Tensor | None,
    ) -> None:
        """Store what block `index` was given and added, if the step's `due` says so."""
        if encoder_in is None or encoder_out is None:
            encoder_in = encoder_out = None
        state = self.state or self.allocate(h_in, encoder_in)
        store_block(state, due, index, h_in, h_out, encoder_in, encoder_out)

    @outside_inference_mode
    def allocate(self, h: torch.Tensor, encoder: torch.Tensor | None) -> BlockState:
        """Make room for what is stored of each block."""
        self.state = BlockState.allocate(h, encoder, self.prunable, self.rule)
        return self.state

    def replace(
        self, first: int, count: int, h: torch.Tensor, encoder: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what blocks `first` to ``first + count - 1`` would have made of the streams."""
        assert self.state is not None
        added = self.state.encoder_residuals
        if encoder is None or added is None:
            h, _ = add_residuals(h, self.state.residuals, first, count)
            return h, encoder
        return add_residuals(h, self.state.residuals, first, count, encoder, added)

    def nbytes(self) -> int:
        """Bytes of the stored streams."""
        return 0 if self.state is None else self.state.nbytes


class PrunedLane:
    """The steps of one block stack under one guidance branch.

    Args:
        settings: with a `DBPruneConfig`.
        prunable: which blocks may be left out, from the first of them to the last.
        device: of the blocks.
    """

    HOST = ("step", "has_reference", "cached", "cached_steps", "consecutive", "knows_counts")

    @outside_inference_mode
    def __init__(
        self, settings: StackSettings, prunable: Sequence[bool], device: torch.device
    ) -> None:
        assert isinstance(settings.cache, DBPruneConfig)
        self.settings = settings
        self.config = settings.cache
        self.cache = BlockCache(prunable, self.config.rule, device)
        self.device = device
        self.layout: Layout | None = None
        self.state = BlockSteps.allocate(FIRST_CAPACITY, prunable, device)
        self._load_settings()
        self.start_request()

    def _load_settings(self) -> None:
        """Write the parameters and the plan to the device."""
        config, lane = self.config, self.state.lane
        limits, thresholds = lane.limits.cpu(), lane.thresholds.cpu()
        limits[ls.MAX_CACHED] = config.max_steps
        limits[ls.MAX_CONSECUTIVE] = config.max_continuous_cached_steps
        thresholds[ls.THRESHOLD] = config.threshold
        lane.limits.copy_(limits)
        lane.thresholds.copy_(thresholds)
        self._limits, self._thresholds = limits.tolist(), thresholds.tolist()
        self.state.store[bs.EVERY] = config.residual_cache_update_interval
        self.cache.write_rule(config.rule)
        self._write_plan()

    def _write_plan(self) -> None:
        lane = self.state.lane
        self.plan = make_plan(self.config, lane.capacity, self.settings.steps)
        lane.plan.copy_(torch.tensor(self.plan, dtype=torch.int32))

    @outside_inference_mode
    def replan(self, settings: StackSettings) -> None:
        """Take over settings that differ in the mask."""
        assert isinstance(settings.cache, DBPruneConfig)
        self.settings, self.config = settings, settings.cache
        self._write_plan()

    @outside_inference_mode
    def reload(self, settings: StackSettings) -> None:
        """Take over settings that need no other buffers."""
        assert isinstance(settings.cache, DBPruneConfig)
        self.settings, self.config = settings, settings.cache
        self._load_settings()

    def start_request(self) -> None:
        """Forget the last request; the buffers stay allocated."""
        self.step = self.cached_steps = self.consecutive = 0
        self.knows_counts = True
        self.cached = self.has_reference = False
        self.skipped: list[bool] = []
        self.state.lane.reset()

    def start_step(self, layout: Layout, device: torch.device) -> PlanCode:
        """Return the step's plan code; what is stored is dropped if the `layout` changed."""
        if device != self.device:
            self._move(device)
        if layout != self.layout:
            self.take_buffers(layout, {})
        if self.step >= len(self.plan):
            self.reserve(2 * len(self.plan))
        return self.plan[self.step]

    @outside_inference_mode
    def reserve(self, steps: int) -> None:
        """Make room for a request of `steps` steps."""
        if steps > len(self.plan):
            self.state.grow(steps)
            self._write_plan()

    @outside_inference_mode
    def _move(self, device: torch.device) -> None:
        self.device, self.state = device, self.state.clone(device)
        self.cache.move(device)

    def buffers_by_name(self) -> dict[str, torch.Tensor | None]:
        """Return what is stored of the blocks."""
        return self.cache.buffers_by_name()

    def learned(self) -> list[torch.Tensor]:
        """Return nothing: there is no predictor."""
        return []

    def take_buffers(self, layout: Layout, buffers: dict[str, Any]) -> None:
        """Go on with what is stored of another layout, or with nothing; what it holds is void."""
        if self.has_reference:
            self.state.lane.invalidate()
            self.has_reference = False
        self.layout = layout
        self.cache.take_buffers(buffers)

    def force(self, code: PlanCode) -> None:
        """Fix what the next step will be."""
        self.plan[self.step] = code
        self.state.lane.plan[self.step] = code

    def known(self) -> list[bool] | None:
        """Return which blocks the next step leaves out; None where their changes decide."""
        code, nothing = self.plan[self.step], [False] * len(self.cache.prunable)
        if not self.has_reference or code in (PlanCode.WARMUP, PlanCode.MASK):
            return nothing
        if code == PlanCode.STATIC:
            return self.cache.prunable
        if not self.knows_counts:
            self._read_counts()
        counters = [0] * ls.NUM_COUNTERS
        counters[ls.CACHED_STEPS], counters[ls.CONSECUTIVE] = self.cached_steps, self.consecutive
        counters[ls.REFERENCE] = 1
        zeros = [0.0] * ls.NUM_VALUES
        reason = choose(counters, zeros, self._limits, self._thresholds, code, None)
        return None if reason is Reason.NAN else nothing

    def _read_counts(self) -> None:
        """Learn the counts after steps that the host did not follow."""
        counters = self.state.lane.counters.tolist()
        self.cached_steps, self.consecutive = counters[ls.CACHED_STEPS], counters[ls.CONSECUTIVE]
        self.knows_counts = True

    def settle(self, known: list[bool] | None) -> list[bool]:
        """Count a step that is decided on the device; return which blocks it leaves out.

        Args:
            known: what `known` gave, before the step.
        """
        self.skipped = self.cache.read(self.state.flags) if known is None else known
        self.cached = True in self.skipped
        self.cached_steps += self.cached
        self.consecutive = (self.consecutive + 1) * self.cached
        self.step += 1
        return self.skipped

    def count(self) -> None:
        """Count a step without knowing how it was decided."""
        self.step += 1
        self.cached = self.knows_counts = False

    def stores(self) -> bool:
        """Whether the blocks that run on the step just counted are to be stored."""
        interval = self.config.residual_cache_update_interval
        return not self.has_reference or (self.step - 1) % interval == 0

    def forget_reference(self) -> None:
        """Make the next step a full one: nothing that was stored holds any more."""
        self.has_reference = False
        self.state.lane.counters[ls.REFERENCE] = 0

    def rewind(self, step: int) -> None:
        """Go back to `step` after an exception: what came since counts as never begun."""
        self.step, self.knows_counts = step, False
        self.forget_reference()
        self.state.lane.counters[ls.STEP] = step

    def abort_step(self) -> None:
        """Undo a step that an exception cut short: it counts as never begun."""
        self.rewind(self.step - 1)
        if self.cached:
            self.state.lane.counters[ls.CACHED_STEPS] -= 1

    def trace(self) -> tuple[list[int], list[float]]:
        """Read back the reasons, and per step the smallest change of a block that may be left out
        (-1: not measured)."""
        lane = self.state.lane
        steps = int(lane.counters[ls.STEP])
        return lane.trace_reason[:steps].tolist(), lane.trace_diff[:steps].tolist()

    def pruned(self) -> list[list[bool]]:
        """Read back which blocks were left out on each step."""
        steps = int(self.state.lane.counters[ls.STEP])
        return [[bool(flag) for flag in row] for row in self.state.trace[:steps].tolist()]

    def nbytes(self) -> int:
        """Bytes of the lane's buffers."""
        return self.cache.nbytes()


class BlockDecision:
    """Whether a block is left out on the next step, for recorded work; see `recording.Decision`.

    Args:
        lane: takes the decision.
        index: which block of the run.
        counts: this is the first block of the step: it counts the step and reads for all.
    """

    def __init__(self, lane: PrunedLane, index: int, counts: bool) -> None:
        self.lane = lane
        self.index = index
        self.counts = counts
        self.flag = lane.state.flags[index : index + 1]

    def read(self) -> bool:
        """Return how it was decided."""
        if self.counts:
            self.lane.settle(self.lane.known())
        return self.lane.skipped[self.index]

    def has_run(self, cached: bool) -> None:
        """Blocks that run are stored, and the others were."""
        self.lane.has_reference = True

    def count(self) -> None:
        """Count the step, once; the host does not learn how it was decided."""
        if self.counts:
            self.lane.count()
            self.lane.has_reference = True
