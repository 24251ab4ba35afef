"""What `enable` made of one transformer: its stacks and settings, which requests share."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dbcache.adapters.blocks.infer import learn
from dbcache.adapters.blocks.plain_loops import PlainLoops, plain_loops
from dbcache.adapters.blocks.signature import CONDITIONS, ArgumentFinder
from dbcache.adapters.blocks.spec import TransformerSpec
from dbcache.adapters.blocks.views import Shown, shown
from dbcache.adapters.patching.attention import ModelAttention
from dbcache.adapters.patching.patch_functor import Patches
from dbcache.adapters.requests.lane_pool import LanePool, LaneSet
from dbcache.adapters.stacks.base import BlockStack
from dbcache.adapters.stacks.build import make_stacks
from dbcache.adapters.stacks.proxies import Loop
from dbcache.adapters.stacks.stack_run import StackRun
from dbcache.config.cache import DBCacheConfig, ParamsModifier, StackSettings, merge
from dbcache.graphs.cuda_capture import UserCapture
from dbcache.graphs.graph import GraphExecutor, GraphOptions
from dbcache.lanes.sharding import Sharding
from dbcache.notices import say


def _without_steps(config: DBCacheConfig) -> dict[str, Any]:
    """Return the fields of `config` but the number of steps, which no lane depends on."""
    return {**config.as_dict(), "num_inference_steps": None, "max_warmup_steps": config.warmup}


@dataclass(eq=False, repr=False)
class Setup:
    """The stacks of one transformer under one set of settings. Nothing of a request is kept here.

    Args:
        spec: the transformer and its block stacks.
        base: what holds for all stacks.
        modifiers: what each stack does differently; the first one's also counts for what concerns
            the transformer as a whole (guidance, steps per request, refresh).
        graph_options: how to record CUDA graphs; None runs eagerly.
        sharding: the ranks that share the transformer, if there are any. It then runs eagerly.
        patches: what a functor changes.
        attention: the backend of its attention; None leaves that as it is.

    Attributes:
        views: where the model sees its lists of blocks; set when the cache is switched on.
        original: the transformer's own forward; set when the cache is switched on.
        reruns: its forwards that autograd may run again; set when the cache is switched on.
        lanes: those of closed requests.
        capture: records branches while the user captures a graph; made when that is first done.
        partial: guidance branches whose calls leave blocks out.
        shown: what forwards see in place of the blocks, made of the stacks' `entries`.
    """

    spec: TransformerSpec
    base: StackSettings
    modifiers: list[ParamsModifier | None]
    graph_options: GraphOptions | None = None
    sharding: Sharding | None = None
    patches: Patches | None = None
    attention: ModelAttention | None = None

    def __post_init__(self) -> None:
        self.module, options = self.spec.transformer, self.graph_options
        self.config = self.base.modified(self.modifiers[0]).cache
        separate_cfg = self.config.enable_separate_cfg
        self.separate_cfg = self.spec.separate_cfg if separate_cfg is None else separate_cfg
        self.condition_of = ArgumentFinder(self.module, CONDITIONS)
        self.graphs = None if options is None else GraphExecutor(self.module, options)
        if self.sharding is not None and (self.sharding.spreads or self.sharding.votes):
            self._run_eagerly()
        self._records = self.graphs is not None
        self.capture: UserCapture | None = None
        self.views: Any = None
        self.original: Any = None
        self.loops: PlainLoops = {}
        self.reruns: Any = None
        self.partial: set[str | None] = set()
        self.lanes = LanePool()
        self._learning = threading.RLock()
        self._origin: Setup | None = None
        self._make_stacks()

    def _make_stacks(self) -> None:
        stacks, sharding = make_stacks(self.spec.stacks, self.base, self.modifiers), self.sharding
        self.let_vote(stacks)
        for stack in stacks:
            separate = stack.settings.cache.cfg_diff_compute_separate
            if sharding is not None and sharding.splits_guidance and not separate:
                raise ValueError(
                    f"{stack.name}: cfg_diff_compute_separate must be True with cfg_size=2, "
                    f"got False; the branches are measured on different ranks"
                )
            if self._records:
                stack.prepare_recording()
        self.lists = [block_list for stack in stacks for block_list in stack.lists]
        self._show(stacks)
        self.stacks = stacks  # last: a request in another thread may wait for them

    def _run_eagerly(self) -> None:
        """Record no graphs, since ranks share the transformer."""
        if self.graphs is not None:
            say(
                f"{type(self.module).__name__}: CUDA graphs are not recorded of a transformer that "
                f"ranks share; runs eagerly. Leave out cuda_graph"
            )
            self.graphs.retire()
            self.graphs = self.graph_options = None

    def let_vote(self, stacks: Sequence[BlockStack]) -> None:
        """Let the ranks vote that share the transformer, if there are any by now."""
        if self.sharding is None or not self.sharding.votes:
            return
        self._run_eagerly()
        for stack in stacks:
            if stack.settings.cache.batch_reduce == "each":
                raise ValueError(
                    f"{stack.name}: batch_reduce must be 'mean' or 'max' where ranks decide "
                    f"together, got 'each'; choose one of these, or leave out parallelism_config "
                    f"and decide_together"
                )
            stack.sharding = self.sharding

    def take_lanes(self, shape: object) -> LaneSet:
        """Return lanes for a request whose latents have the given shape."""
        stacks = self.stacks  # another thread may learn them meanwhile
        self.views.find_graphs(self.lists)
        return self.lanes.take(stacks, shape, lambda: self._make_lanes(stacks))

    def _make_lanes(self, stacks: Sequence[BlockStack]) -> LaneSet:
        lanes = LaneSet([StackRun(stack) for stack in stacks])
        for run in lanes.runs:
            run.shared.by_device |= self._records
        return lanes

    def take_up_blocks(self) -> Shown:
        """Take up blocks that were exchanged since; return what forwards see from now on."""
        for stack in self.stacks:
            if any(
                [*block_list.owner._modules[block_list.name]._modules.values()] != block_list.seen  # type: ignore[union-attr]
                for block_list in stack.lists
            ):
                stack.take_up_blocks()
        return self._show(self.stacks)

    def _show(self, stacks: Sequence[BlockStack]) -> Shown:
        showing = [stack for stack in stacks if stack.entries]
        lists = [block_list for stack in showing for block_list in stack.lists]
        entries = [row for stack in showing for row in stack.entries]
        rows = [Loop(row, its.path) for row, its in zip(entries, lists, strict=True)]
        self.entries = [stack.entries for stack in stacks]
        self.shown = shown(lists, rows, self.module)
        return self.shown

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward that tells what the blocks take and return; return its output."""
        with self._learning:
            if self.stacks:  # another request has learned them meanwhile
                return self.original(*args, **kwargs)
            output, stacks = learn(self.spec, self.views, self.original, args, kwargs)
            pairs = zip(stacks, self.modifiers, strict=True)
            self.modifiers = [modifier for stack, modifier in pairs if stack is not None]
            kept = tuple(stack for stack in stacks if stack is not None)
            self.spec = replace(self.spec, stacks=kept)
            self._make_stacks()
            if self._origin is not None and not self._origin.stacks:
                self._origin.spec, self._origin.modifiers = self.spec.twin(), self.modifiers
                self._origin._make_stacks()
        return output

    def bind(self, views: Any, original: Any, reruns: Any) -> None:
        """Learn where the model sees its lists, and its own forward: the cache is switched on."""
        self.views, self.original, self.reruns = views, original, reruns
        self.loops = plain_loops(original)

    def retire(self, current: Sequence[Setup]) -> None:
        """Give recorded graphs up that none of the setups in force goes on with."""
        if self.graphs is not None and not any(self.graphs is one.graphs for one in current):
            self.graphs.retire()

    def renewed(
        self, changes: ParamsModifier, *, for_request: bool = False, overrides: bool = False
    ) -> Setup:
        """Return one with the given fields of `changes` on top; itself if they change nothing.

        Args:
            changes: fields that were given count.
            for_request: the new one is for a single request, beside this one.
            overrides: `changes` take the place of what single stacks do differently.

        Raises:
            ValueError: values that are not allowed, or do not go together.
        """
        base, config = self.base.modified(changes), merge(self.config, changes.cache_config)
        is_same = _without_steps(config) == _without_steps(self.config)
        if is_same and base.predictor == self.base.predictor:
            if config.num_inference_steps == self.config.num_inference_steps:
                return self
            twin = copy.copy(self)
            twin.base, twin.config, twin._origin = base, config, self
            return twin
        with self._learning:
            spec, modifiers = self.spec.twin(), self.modifiers
        if overrides:
            modifiers = [changes for _ in modifiers]
        renewed = replace(self, spec=spec, base=base, modifiers=modifiers)
        renewed.inherit(self, always=for_request)
        return renewed

    def inherit(self, old: Setup, *, always: bool = False) -> None:
        """Take over what is known of the blocks; lanes and recorded graphs where these fit.

        With `always` lanes and graphs are shared even if they do not fit all of both.
        """
        if self.patches is not old.patches or self.graph_options != old.graph_options:
            return  # functors cannot be compared
        if [stack.geometry for stack in self.stacks] != [stack.geometry for stack in old.stacks]:
            return
        for stack, its_old in zip(self.stacks, old.stacks, strict=True):
            if [own.seen for own in stack.lists] == [old.seen for old in its_old.lists]:
                stack.inherit(its_old)
            else:  # blocks were exchanged, and the old one has run no step since
                stack.generation = its_old.generation + 1
        self.bind(old.views, old.original, old.reruns)
        self.partial = old.partial
        if always or [s.recorded for s in self.stacks] == [s.recorded for s in old.stacks]:
            self.lanes, self.graphs, self.capture = old.lanes, old.graphs, old.capture
