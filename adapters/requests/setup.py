"""What `enable` made of one transformer: its stacks and settings, which requests share."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Sequence
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
from dbcache.graphs.cuda_capture import UserCapture, user_capture
from dbcache.graphs.graph import GraphExecutor, GraphOptions
from dbcache.lanes.sharding import Sharding
from dbcache.notices import say


def _without_steps(config: DBCacheConfig) -> dict[str, Any]:
    """Return the fields of `config` but the number of steps, which no lane depends on."""
    return {**config.as_dict(), "num_inference_steps": None, "max_warmup_steps": config.warmup}


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
        partial: guidance branches whose calls leave blocks out.
        shown: what forwards see in place of the blocks, made of the stacks' `entries`.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        base: StackSettings,
        modifiers: list[ParamsModifier | None],
        *,
        graph_options: GraphOptions | None = None,
        sharding: Sharding | None = None,
        patches: Patches | None = None,
        attention: ModelAttention | None = None,
    ) -> None:
        self.spec = spec
        self.module = spec.transformer
        self.base = base
        self.modifiers = modifiers
        self.sharding = sharding
        self.patches = patches
        self.attention = attention
        is_shared = sharding is not None and (sharding.spreads or sharding.votes)
        if graph_options is not None and is_shared:
            self._warn_of_graphs()
            graph_options = None
        self._records = graph_options is not None
        self.config = base.modified(modifiers[0]).cache
        separate_cfg = self.config.enable_separate_cfg
        self.separate_cfg = spec.separate_cfg if separate_cfg is None else separate_cfg
        self.condition_of = ArgumentFinder(self.module, CONDITIONS)
        self.graphs = None if graph_options is None else GraphExecutor(self.module, graph_options)
        self.capture: UserCapture | None = None
        self.views: Any = None
        self.original: Any = None
        self.loops: PlainLoops = {}
        self.reruns: Any = None
        self.partial: set[str | None] = set()
        self.lanes = LanePool()
        self._learning = threading.RLock()
        self._origin: Setup | None = None
        self._set_stacks(self._make_stacks())

    def _make_stacks(self) -> list[BlockStack]:
        stacks = make_stacks(self.spec.stacks, self.base, self.modifiers)
        sharding = self.sharding
        self._let_vote(stacks)
        for stack in stacks:
            separate = stack.settings.cache.cfg_diff_compute_separate
            if sharding is not None and sharding.splits_guidance and not separate:
                raise ValueError(
                    f"{stack.name}: cfg_diff_compute_separate must be True with cfg_size=2, "
                    f"got False; the branches are measured on different ranks"
                )
            if self._records:
                stack.prepare_recording()
        return stacks

    def _warn_of_graphs(self) -> None:
        say(
            f"{type(self.module).__name__}: CUDA graphs are not recorded of a transformer that "
            f"ranks share; runs eagerly. Leave out cuda_graph"
        )

    def take_up_ranks(self) -> None:
        """Let the ranks vote that share the transformer since."""
        if self.sharding is None or not self.sharding.votes:
            return
        if self.graphs is not None:
            self._warn_of_graphs()
            self.graphs.retire()
            self.graphs = None
        self._let_vote(self.stacks)

    def _let_vote(self, stacks: Sequence[BlockStack]) -> None:
        if self.sharding is None or not self.sharding.votes:
            return
        for stack in stacks:
            if stack.settings.cache.batch_reduce == "each":
                raise ValueError(
                    f"{stack.name}: batch_reduce must be 'mean' or 'max' where ranks decide "
                    f"together, got 'each'; choose one of these, or leave out parallelism_config "
                    f"and decide_together"
                )
            stack.sharding = self.sharding

    def _set_stacks(self, stacks: list[BlockStack]) -> None:
        self.lists = [block_list for stack in stacks for block_list in stack.lists]
        self._show(stacks)
        self.stacks = stacks  # last: a request in another thread may wait for them

    def take_lanes(self, shape: object) -> LaneSet:
        """Return lanes for a request whose latents have the given shape."""
        stacks = self.stacks  # another thread may learn them meanwhile
        self.views.find_graphs(self.lists)
        return self.lanes.take(stacks, shape, lambda: self._make_lanes(stacks))

    def _make_lanes(self, stacks: Sequence[BlockStack]) -> LaneSet:
        lanes = LaneSet([StackRun(stack) for stack in stacks])
        if self._records:
            for run in lanes.runs:
                run.shared.by_device = True
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
            self.spec = dataclasses.replace(self.spec, stacks=kept)
            self._set_stacks(self._make_stacks())
            if self._origin is not None and not self._origin.stacks:
                self._origin.spec, self._origin.modifiers = self.spec.twin(), self.modifiers
                self._origin._set_stacks(self._origin._make_stacks())
        return output

    def bind(self, views: Any, original: Any, reruns: Any) -> None:
        """Learn where the model sees its lists, and its own forward: the cache is switched on."""
        self.views, self.original, self.reruns = views, original, reruns
        self.loops = plain_loops(original)

    def retire(self, current: Sequence[Setup]) -> None:
        """Give recorded graphs up that none of the setups in force goes on with."""
        if self.graphs is not None and not any(self.graphs is one.graphs for one in current):
            self.graphs.retire()

    def user_capture(self) -> UserCapture:
        """Return what records branches while the user captures a graph."""
        if self.capture is None:
            self.capture = user_capture(next(self.module.parameters()).device)
        return self.capture

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
        base = self.base.modified(changes)
        with self._learning:
            spec, modifiers = self.spec.twin(), self.modifiers
        if overrides:
            modifiers = [changes for _ in modifiers]
        config = merge(self.config, changes.cache_config)
        if base.predictor == self.base.predictor:
            if config.as_dict() == self.config.as_dict() and config.warmup == self.config.warmup:
                return self
            if _without_steps(config) == _without_steps(self.config):
                twin = copy.copy(self)
                twin.base, twin.config, twin._origin = base, config, self
                return twin
        renewed = Setup(
            spec,
            base,
            modifiers,
            graph_options=None if self.graphs is None else self.graphs.options,
            sharding=self.sharding,
            patches=self.patches,
            attention=self.attention,
        )
        renewed.inherit(self, always=for_request)
        return renewed

    def inherit(self, old: Setup, *, always: bool = False) -> None:
        """Take over what is known of the blocks; lanes and recorded graphs where these fit.

        With `always` lanes and graphs are shared even if they do not fit all of both.
        """
        options, its_options = (x.graphs and x.graphs.options for x in (self, old))
        if self.patches is not old.patches or options != its_options:
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
