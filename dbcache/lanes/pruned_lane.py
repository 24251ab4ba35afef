"""One lane of DBPrune: its steps, its stored blocks, and the decision which ones to leave out.

All decisions are taken on the device. The host reads which blocks are left out, once per step;
where plan, limits or a missing reference say it, it knows by the same rules, and reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dbcache.config.cache import StackSettings
from dbcache.config.prune import DBPruneConfig
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import PlanCode, Reason
from dbcache.kernels.decision.decide import choose
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.block_state import BlockSteps
from dbcache.kernels.pruning.decide_step import decide_step
from dbcache.lanes.block_store import BlockStore
from dbcache.lanes.buffers import Layout, outside_inference_mode
from dbcache.lanes.decision import Decision, decisions_on_blocks
from dbcache.lanes.lane import LaneBase
from dbcache.lanes.sharding import Sharding
from dbcache.lanes.step_state import FIRST_CAPACITY, StepState


class PrunedLane(LaneBase):
    """One lane whose steps leave out single blocks.

        code    = lane.begin(layout, device)
        known   = lane.known()
        lane.decide(None if known is not None else lane.blocks.measure(hidden))
        skipped = lane.settle(known)

    Args:
        settings: with a `DBPruneConfig`.
        prunable: which blocks may be left out, from the first of them to the last.
        device: of the blocks.

    Attributes:
        steps: where the lane stands in its request.
        blocks: what is stored of each block.
        layout: what it was stored for.
    """

    steps: StepState[BlockSteps]

    @outside_inference_mode
    def __init__(
        self, settings: StackSettings, prunable: Sequence[bool], device: torch.device
    ) -> None:
        self.layout: Layout | None = None
        self.steps = StepState(BlockSteps.allocate(FIRST_CAPACITY, prunable, device))
        self.blocks = BlockStore(prunable, device)
        self.reload(settings)

    @property
    def state(self) -> BlockSteps:
        """The scalars on the device."""
        return self.steps.state

    @outside_inference_mode
    def reload(self, settings: StackSettings) -> None:
        """Use settings that need no other buffers."""
        config = settings.cache
        assert isinstance(config, DBPruneConfig)
        self._interval = config.residual_cache_update_interval
        self.state.store[bs.EVERY] = self._interval
        self.blocks.rule.copy_(torch.tensor(config.rule, dtype=torch.float32, device="cpu"))
        limits = {
            ls.MAX_CACHED: config.max_steps,
            ls.MAX_CONSECUTIVE: config.max_continuous_cached_steps,
        }
        self.steps.load(settings, limits, {ls.THRESHOLD: config.threshold})

    def replan(self, settings: StackSettings) -> None:
        """Use settings that differ in the mask."""
        self.steps.replan(settings)

    def begin(self, layout: Layout, device: torch.device) -> int:
        """Return the next step's plan code; a changed `layout` drops all that is stored."""
        changed, is_moved = layout != self.layout, device != self.steps.device
        code = self.steps.begin(changed, device)
        if is_moved:
            self.blocks.move(device)
        if changed:
            self.layout, self.blocks.state = layout, None
        return code

    def known(self) -> list[bool] | None:
        """Return which blocks the next step leaves out; None where their changes decide."""
        steps, prunable = self.steps, self.blocks.prunable
        code, counters = steps.plan[steps.step], [0] * ls.NUM_COUNTERS
        counters[ls.REFERENCE] = int(steps.has_reference)
        if steps.has_reference and code == PlanCode.DYNAMIC:
            counters[ls.CACHED_STEPS], counters[ls.CONSECUTIVE] = steps.learn_counts()
        lane = (counters, [0.0] * ls.NUM_VALUES, steps.limits, steps.thresholds)
        reason = choose(lane, code, None)
        if reason is Reason.NAN:
            return None
        return prunable if reason.cached else [False] * len(prunable)

    def decide(self, change: torch.Tensor | None, sharding: Sharding | None = None) -> None:
        """Decide on the device which blocks the next step leaves out.

        Args:
            change: what `blocks.measure` gave; None where nothing is to be compared.
            sharding: as in `BlockStore.choose`.
        """
        decisions = None if change is None else self.blocks.choose(change, sharding)
        decide_step(self.state, decisions)

    def settle(self, known: list[bool] | None) -> list[bool]:
        """Count the step; return which blocks it leaves out, read only where the step is open.

        Args:
            known: what `known` gave, before the step.
        """
        skipped = self.blocks.read(self.state.flags) if known is None else known
        self.steps.advance(True in skipped)
        return skipped

    def decisions(self) -> list[Decision]:
        """Return the decisions of the next step, one per block, for recorded work."""

        def read() -> list[bool]:
            skipped = self.settle(self.known())
            self.steps.has_reference = True  # blocks that run are stored, and the others were
            return skipped

        return decisions_on_blocks(self.state.flags, read, self.steps.count)

    def stores(self) -> bool:
        """Whether the step just counted stores the blocks that run."""
        return not self.steps.has_reference or (self.steps.step - 1) % self._interval == 0

    def stored(self) -> tuple[Any, ...]:
        """Return what holds the tensors of the layout, for `take`."""
        return (self.blocks.state,)

    def take(self, layout: Layout, stored: tuple[Any, ...]) -> None:
        """Continue with what was `stored` for another layout; its content is void."""
        self.steps.invalidate()
        self.layout, (self.blocks.state,) = layout, stored

    def tensors(self) -> list[torch.Tensor | None]:
        """Return all tensors that a step writes to."""
        return [*self.state.tensors(), *self.blocks.tensors()]

    @outside_inference_mode
    def pruned_snapshot(self) -> Callable[[], list[list[bool]]]:
        """Return a function that reads back which blocks were left out on each step so far."""
        counters, trace = self.steps.state.counters.clone(), self.state.trace.bool()
        return lambda: trace[: int(counters[ls.STEP])].tolist()

    def nbytes(self) -> int:
        """Bytes of the lane's buffers."""
        return self.blocks.nbytes()
