"""What one request keeps of one block stack: its settings, and a lane per guidance branch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dbcache.adapters.stacks.offload_groups import OffloadGroups
from dbcache.config.cache import DBCacheConfig, ParamsModifier
from dbcache.config.schedule import fit_to_steps
from dbcache.lanes.plan import check_retention, resolve_mask
from dbcache.lanes.predictors import check_steps_are_known
from dbcache.lanes.sharding import Sharding
from dbcache.lanes.shared_change import SharedChange


def row_key(branch: str | None, place: int) -> str:
    """Return the key of the lane of one row of a batch, as in ``"cond[0]"``."""
    return f"{branch or ''}[{place}]"


class StackRun:
    """One stack in one request.

    Args:
        stack: the blocks, which all requests share, with the settings of this one.

    Attributes:
        prepared: the settings as they were given.
        settings: with the number of steps and the mask of the request under way.
        lanes: by guidance branch.
        samples: how many a branch had at its last step, where each decides for itself.
        shared: the change that the branches share.
        source: what a policy without a probe measures; None where it is the probe.
        generation: of the stack, whose blocks were stored.
        sharding: ranks that vote on decisions; None where each decides for itself.
        recorder: notes of full steps what a calibration is made of.
        is_on_host: what is stored lies in host memory.
        groups: blocks whose weights are moved together; None without.
    """

    def __init__(self, stack: Any) -> None:
        self.stack = stack
        self.prepared = self.settings = stack.settings
        self.lanes: dict[str | None, Any] = {}
        self.samples: dict[str | None, int] = {}
        self.shared = SharedChange(self.settings.cache)
        self.source = stack.make_source()
        self._read_ranks()
        self.recorder = stack.recorder
        self.generation = stack.generation
        self.is_on_host = self.settings.cache.cache_device == "cpu"
        self.groups: OffloadGroups | None = None

    def serve(self, stack: Any) -> None:
        """Go on for a stack of the same blocks, whose settings need no other buffers."""
        self.stack, self.recorder = stack, stack.recorder
        if stack.settings is not self.prepared:
            self.prepared = self.settings = stack.settings
            for lane in self.lanes.values():
                lane.reload(stack.settings)

    def _read_ranks(self) -> None:
        self.sharding: Sharding | None = self.stack.sharding
        self.votes = self.sharding is not None
        if self.sharding is not None and self.source is not None:
            self.votes = not (self.source.is_whole and self.sharding.sees_whole)
            self.source.vote = self.sharding.vote if self.votes else None

    def check_needs_no_vote(self) -> None:
        """Raise if a decision needs a message, which a recording would not repeat in time."""
        if self.sharding is not None:
            raise RuntimeError(
                f"{self.stack.name}: a step whose decision the ranks of a sequence vote on cannot "
                f"be captured, got one under capture; run it outside of the graph, or use tp_size"
            )

    def start_request(self) -> None:
        """Forget the last request."""
        self.shared.start_request()
        self.samples.clear()
        if self.source is not None:
            self.source.start_request()
        for lane in self.lanes.values():
            lane.start_request()

    def plan(
        self, steps: int | None, at_most: int | None = None, shared: int | None = None
    ) -> None:
        """Fit plan and predictor to a request.

        Args:
            steps: how many steps it has, None if nothing tells.
            at_most: as many as the scheduler has, which some pipelines cut short; or the part of
                them that falls to this transformer.
            shared: of a loop that other transformers run the rest of.

        Raises:
            ValueError: they do not fit, or need the number of steps.
        """
        self._read_ranks()
        self.groups = OffloadGroups.of(self.stack.in_order())
        name, cache = self.stack.name, self.prepared.cache
        given, steps = steps, at_most if steps is None else steps
        is_named = isinstance(cache.steps_computation_mask, str)
        mask = resolve_mask(cache, steps if is_named else given, name)
        check_retention(cache, steps, name)
        check_steps_are_known(self.settings.predictor, steps, name)
        told = (steps, at_most) if shared is None else (given, None)
        lanes = fit_to_steps(self.prepared.calibration, *told, name, shared)
        settings = replace(self.settings, steps=steps, loop=shared, calibration=lanes)
        if mask != settings.cache.steps_computation_mask:
            # the number of steps has done its part: the mask must not be compared with it again
            changes = DBCacheConfig(steps_computation_mask=mask, num_inference_steps=None)
            settings = settings.modified(ParamsModifier(cache_config=changes))
        if settings != self.settings:
            self.settings = settings
            for lane in self.lanes.values():
                lane.replan(settings)

    def take_up_blocks(self) -> None:
        """Drop what was stored of blocks that were exchanged since."""
        if self.generation == self.stack.generation:
            return
        self.generation = self.stack.generation
        for branch, lane in list(self.lanes.items()):
            if self.stack.fits(lane):
                lane.forget_reference()
            else:
                del self.lanes[branch]

    def keys_of(self, branch: str | None) -> list[Any]:
        """Return the keys of the lanes of a branch: its own, or those of its rows."""
        rows = row_key(branch, 0)[:-2]
        return [k for k in list(self.lanes) if k == branch or (k or "").startswith(rows)]

    def note_samples(self, branch: str | None, count: int) -> None:
        """Forget what is stored of a branch's samples where there are more or fewer than before.

        They are known by their places, at which there may now be others.
        """
        if self.samples.setdefault(branch, count) != count:
            self.samples[branch] = count
            for key in self.keys_of(branch):
                self.forget(key)

    def forget(self, branch: str | None) -> bool:
        """Make the next step of a branch a full one; say whether it could have been cached."""
        lane = self.lanes.get(branch)
        if lane is None or not lane.steps.has_reference:
            return False
        lane.forget_reference()
        return True
