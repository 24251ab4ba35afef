"""A transformer with the cache on: its forward, its requests and its guidance branches.

Only the instance is touched: `forward` and `cache_context` get an entry in its `__dict__`, and
while a forward runs so do the lists of blocks, whose guards then shadow them.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dbcache.adapters.blocks.block_adapter import TransformerSpec
from dbcache.adapters.blocks.infer import learn
from dbcache.adapters.patching.instance_method import InstanceMethod
from dbcache.adapters.patching.patch_functor import Patches
from dbcache.adapters.requests.guidance import LEAVES_OUT, Branches, ConditionFinder, form_of
from dbcache.adapters.stacks.build import make_stacks
from dbcache.adapters.stacks.stack import Stack
from dbcache.config.cache import DBCacheConfig, ParamsModifier, StackSettings, merge
from dbcache.graphs.cuda_capture import UserCapture, is_capturing, user_capture
from dbcache.graphs.graph import GraphExecutor, GraphOptions
from dbcache.graphs.recording import Cutter
from dbcache.graphs.trial import Restorable
from dbcache.lanes.lane import Lane, LaneCopy
from dbcache.lanes.sharding import Sharding
from dbcache.lanes.shared_change import SharedCopy

HANDLE = "_dbcache"
"""Name of the attribute by which a transformer or pipeline knows its handle."""

ALL = object()
"""Stands for all branches."""


def _without_steps(config: DBCacheConfig) -> dict[str, Any]:
    """Return the fields of `config` but the number of steps, which no lane depends on."""
    return {**config.as_dict(), "num_inference_steps": None}


def _no_handle() -> None:
    return None


class CachedTransformer:
    """Runs a transformer's forward with guards in place of its blocks.

    Args:
        spec: the transformer and its block stacks.
        settings: what holds for all stacks.
        modifiers: what each stack does differently; the first one's also counts for what concerns
            the transformer as a whole (guidance, steps per request, refresh).
        by_request: True where a pipeline opens and closes the requests; a call outside of one
            then runs without the cache.
        graph_options: how to record CUDA graphs; None runs eagerly.
        sharding: how the transformer is spread over ranks; installed and removed with the cache.
            It then runs eagerly.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        settings: StackSettings,
        modifiers: list[ParamsModifier | None],
        *,
        by_request: bool,
        graph_options: GraphOptions | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.spec = spec
        self.sharding = sharding
        self.settings = settings
        self.modifiers = modifiers
        self.by_request = by_request
        self.module = spec.transformer
        if graph_options is not None and sharding is not None:
            warnings.warn(
                f"{type(self.module).__name__}: CUDA graphs are not recorded of a transformer that "
                f"is spread over ranks; runs eagerly. Leave out cuda_graph or parallelism_config",
                stacklevel=2,
            )
            graph_options = None
        self._records = graph_options is not None
        self.stacks = self._make_stacks()
        self.config = settings.modified(modifiers[0]).cache
        separate_cfg = self.config.enable_separate_cfg
        self.separate_cfg = spec.separate_cfg if separate_cfg is None else separate_cfg
        self.patches: Patches | None = None
        self.pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.planned_steps: Callable[[], int | None] | None = None
        self.is_open = not by_request
        self.branch: str | None = None
        self.branches = Branches(alternates=spec.separate_cfg)
        self.calls = 0
        self.loops = 1
        self.uncached_calls = 0
        self.partial_calls = 0
        self.forced: Counter[str] = Counter()
        self._has_begun = False
        self._refreshes = 0
        self._steps: Counter[str | None] = Counter()
        self._partial: set[str | None] = set()
        self._forms: dict[str | None, Any] = {}
        self._condition_of = ConditionFinder(self.module)
        self._patches: list[InstanceMethod] = []
        self.step_branch: str | None = None
        self.graphs = None if graph_options is None else GraphExecutor(self, graph_options)
        self._began_in_capture = False
        self._capture: UserCapture | None = None

    def _make_stacks(self) -> list[Stack]:
        stacks = make_stacks(self.spec.stacks, self.settings, self.modifiers)
        if stacks:
            self._check_long_skips(stacks)
        if self.sharding is not None and self.sharding.splits_sequence:
            for stack in stacks:
                stack.sharding = self.sharding
        if self.sharding is not None and self.sharding.splits_guidance:
            for stack in stacks:
                if not stack.settings.cache.cfg_diff_compute_separate:
                    raise ValueError(
                        f"{stack.name}: cfg_diff_compute_separate must be True with cfg_size=2, "
                        f"got False; the branches are measured on different ranks"
                    )
        if self._records:
            for stack in stacks:
                stack.prepare_recording()
        return stacks

    def _check_long_skips(self, stacks: list[Stack]) -> None:
        """Raise if a block that always runs takes what a block that may be skipped has to make."""
        for spec, stack in zip(self.spec.stacks, stacks, strict=True):
            if spec.long_skips and stack.bn > stack.fn:
                raise ValueError(
                    f"{type(self.module).__name__}.{stack.name}: Bn_compute_blocks must be at most "
                    f"Fn_compute_blocks, got {stack.bn} and {stack.fn}: long skip connections feed "
                    f"what the first blocks make to the last ones; raise Fn_compute_blocks"
                )

    def renewed(self, changes: ParamsModifier) -> CachedTransformer:
        """Return one with the given fields of `changes` on top; itself if that needs no rebuild."""
        settings = self.settings.modified(changes)
        config = merge(self.config, changes.cache_config)
        same_calibrator = settings.predictor == self.settings.predictor
        if same_calibrator and _without_steps(config) == _without_steps(self.config):
            self.settings, self.config = settings, config
            return self
        options = None if self.graphs is None else self.graphs.options
        renewed = CachedTransformer(
            self.spec,
            settings,
            self.modifiers,
            by_request=self.by_request,
            graph_options=options,
            sharding=self.sharding,
        )
        renewed.pipelines, renewed.planned_steps = self.pipelines, self.planned_steps
        renewed.branches, renewed.patches = self.branches, self.patches
        return renewed

    def inherit(self, old: CachedTransformer) -> None:
        """Take over recorded graphs, the user's too, where what changed lies on the device."""
        options, its_options = (x.graphs and x.graphs.options for x in (self, old))
        if options != its_options or (options is None and old._capture is None):
            return
        if [stack.recorded for stack in self.stacks] != [stack.recorded for stack in old.stacks]:
            return
        if self.patches is not old.patches:
            return  # functors cannot be compared
        for stack, its_old in zip(self.stacks, old.stacks, strict=True):
            stack.inherit(its_old)
        self._capture = old._capture  # its pool is the memory of the user's graphs
        self.graphs = old.graphs
        if self.graphs is not None:
            self.graphs.serve(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_handle, ()  # a copy of the transformer has its cache off

    def install(self) -> None:
        """Switch the cache on."""
        if self.sharding is not None:
            self.sharding.install()  # first: its hooks are to lie within the forward's patch
        if self.patches is not None:
            self.patches.redo()
        self.module.__dict__[HANDLE] = self
        self._patches = [InstanceMethod(self.module, "forward", self.forward)]
        if hasattr(self.module, "cache_context"):
            self._patches.append(InstanceMethod(self.module, "cache_context", self.cache_context))

    def remove(self, *, keep_sharding: bool = False) -> None:
        """Switch the cache off and leave no trace."""
        for patch in self._patches:
            patch.remove()
        self._patches = []
        self.module.__dict__.pop(HANDLE, None)
        if self.patches is not None:
            self.patches.undo()
        if self.graphs is not None and self.graphs.transformer is self:  # no other took them over
            self.graphs.retire()
        if self.sharding is not None and not keep_sharding:
            self.sharding.remove()

    @contextmanager
    def cache_context(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Take the name of the guidance branch from the pipeline's own context."""
        outer, self.branch = self.branch, name
        try:
            with self._patches[1].original(name, *args, **kwargs):
                yield
        finally:
            self.branch = outer

    def start_request(self) -> None:
        """Forget all steps; the next call is the first of a new image or video."""
        self.calls = 0
        self._has_begun = True
        self._began_in_capture = is_capturing()
        self._steps.clear()
        self._forms.clear()
        for stack in self.stacks:
            stack.start_request()
        if self.graphs is not None:
            self.graphs.start_request()
        if self.sharding is not None:
            self.sharding.start_request()

    def refresh(self) -> None:
        """Open a new request: a pipeline call begins, or the user says so."""
        self._refreshes = 0
        self.is_open = True
        self.loops = 1
        self.partial_calls = 0
        self.forced.clear()
        self.branches.uncond_first = self.config.cfg_compute_first
        self.branches.start_loop()
        self.start_request()

    def start_loop(self) -> None:
        """Begin anew where a pipeline denoises more than once in a call."""
        if self.calls:
            loops = self.loops + 1
            self.refresh()
            self.loops = loops

    def force_full(self, reason: str, branch: Any = ALL) -> None:
        """Make the next step of a branch, or of all, a full one; `reason` is for the summary."""
        keys = {key for stack in self.stacks for key in stack.lanes} if branch is ALL else {branch}
        for key in keys:
            forgot = [stack.forget(key) for stack in self.stacks]
            self.forced[reason] += any(forgot)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with guards in place of its blocks."""
        if not self.is_open:
            self._note_uncached_call()
            return self._patches[0].original(*args, **kwargs)
        if self.spec.fills is not None and self.spec.fills(kwargs):
            self.start_loop()
            return self._patches[0].original(*args, **kwargs)
        self._start_step(args, kwargs)
        if self.sharding is None:
            output = self._step(args, kwargs)
        else:
            output = self.sharding.by_branch(self.branch, lambda: self._step(args, kwargs))
        self.calls += 1
        self._steps[self.step_branch] += 1
        return output

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.stacks:
            return self._learn(args, kwargs)
        cutter = self._user_capture()
        # a branch whose calls leave blocks out has no step that could be recorded
        if self.graphs is not None and cutter is None and self.step_branch not in self._partial:
            return self.graphs.step(args, kwargs)
        return self.run(args, kwargs, cutter)

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cutter: Cutter | None = None
    ) -> Any:
        """Run one step eagerly, or while a `cutter` records it, with guards in place of blocks."""
        shadowed = []
        try:
            for stack in self.stacks:
                stack.cutter = cutter
                stack.start_step(self.step_branch)
                for block_list, entries in zip(stack.lists, stack.entries, strict=False):
                    block_list.shadow(entries)
                    shadowed.append(block_list)
                stack.notice_call(self.module, args, kwargs)
            output = self._patches[0].original(*args, **kwargs)
            partial = [stack for stack in self.stacks if stack.left_blocks_out()]
            for stack in self.stacks:
                stack.notice_output(output)
        except BaseException:
            if cutter is not None:
                cutter.abort()
            for stack in self.stacks:
                stack.abort_forward()
            raise
        finally:
            for stack in self.stacks:
                stack.cutter = None
            for block_list in shadowed:
                block_list.unshadow()
        for stack in self.stacks:
            stack.abort_forward() if stack in partial else stack.finish_forward()
        if partial:
            self.partial_calls += 1
            self._partial.add(self.step_branch)
        return output

    def _learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward that tells what the blocks take and return; it counts as a full step."""
        output, stacks = learn(self.spec, self._patches[0].original, args, kwargs)
        pairs = zip(stacks, self.modifiers, strict=True)
        self.modifiers = [modifier for stack, modifier in pairs if stack is not None]
        kept = tuple(stack for stack in stacks if stack is not None)
        self.spec = dataclasses.replace(self.spec, stacks=kept)
        self.stacks = self._make_stacks()
        device = next(self.module.parameters(), torch.empty(0)).device
        for stack in self.stacks:
            stack.plan_request(self._num_steps())
            stack.count_full_step(self.step_branch, device)
        for stack in self.stacks:
            stack.forget_step()
        return output

    def lanes(self) -> list[Lane]:
        """Return the lanes of the step under way."""
        lanes = [stack.lanes.get(self.step_branch) for stack in self.stacks]
        return [lane for lane in lanes if lane is not None]

    def kind_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...]:
        """Return what the host reads of a call's tensors; recorded work holds for that alone."""
        sources = [stack.source for stack in self.stacks if stack.source is not None]
        return tuple(source.kind_of(self.module, args, kwargs) for source in sources)

    def copies(self) -> list[Restorable]:
        """Return copies of all that the step under way changes."""
        shared = [SharedCopy(stack.shared) for stack in self.stacks]
        return [*map(LaneCopy, self.lanes()), *shared]

    def _user_capture(self) -> UserCapture | None:
        """Return what records branches while the user captures a graph; None while not.

        Raises:
            RuntimeError: there are no lanes yet, which cannot be made inside a capture.
        """
        if not is_capturing():
            return None
        if any(stack.entries and self.step_branch not in stack.lanes for stack in self.stacks):
            raise RuntimeError(
                f"{type(self.module).__name__}: a step must have run before one is captured, and "
                f"made the buffers, got none of branch {self.step_branch!r}; run one first"
            )
        if self._capture is None:
            self._capture = user_capture(next(self.module.parameters()).device)
        self._capture.fixed_by_plan = self._began_in_capture
        return self._capture

    def _start_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a new request where one is due, and tell the stacks the branch."""
        name = self.branch
        if kwargs.get(LEAVES_OUT):
            name = LEAVES_OUT if name is None else f"{name}, {LEAVES_OUT}"
        if self._is_over(name) or not self._has_begun:
            self._refreshes = 0
            self.start_request()
        elif self._is_refresh_due():
            self._refreshes += 1
            self.start_request()
        if self.calls == 0:
            steps = self._num_steps()
            for stack in self.stacks:
                stack.plan_request(steps)
        self.step_branch = self._find_branch(name, args, kwargs)

    def _is_over(self, name: str | None) -> bool:
        """Say whether the branch has had all its steps, where it is this object that counts."""
        steps = self.config.num_inference_steps
        if self.by_request or steps is None:
            return False
        return self._steps[self._by_parity(name)] >= steps

    def _is_refresh_due(self) -> bool:
        """Say whether the calls so far have reached the hint."""
        repeats = self.config.force_refresh_step_policy == "repeat"
        return self.calls == self.config.force_refresh_step_hint and (
            repeats or self._refreshes == 0
        )

    def _num_steps(self) -> int | None:
        """Return the steps of this request: what the pipeline tells, else what was set."""
        planned = self.planned_steps() if self.planned_steps is not None else None
        return self.config.num_inference_steps if planned is None else planned

    def _by_parity(self, name: str | None) -> str | None:
        """Return the name of a call; where it has none, one by the parity of the calls."""
        if name is not None or not self.separate_cfg:
            return name
        is_second = self.calls % 2 == 1
        return "uncond" if is_second != self.config.cfg_compute_first else "cond"

    def _find_branch(
        self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """Return the branch of a call; see to it that a cached step would continue it."""
        asked = self.config.enable_separate_cfg is not None and name is None
        if not self.branches.is_active or asked:
            branch = self._by_parity(name)
        else:
            branch, is_late = self.branches.of_call(name, self._condition_of(args, kwargs))
            if is_late:
                self.force_full("their branch of guidance had not run just before", branch)
        form = form_of(kwargs)
        if self._forms.setdefault(branch, form) != form:
            changed = sorted(form[0] ^ self._forms[branch][0]) or ["the scale of LoRA"]
            self.force_full(f"inputs came, went or changed ({', '.join(changed)})", branch)
            self._forms[branch] = form
        return branch

    def notes(self) -> list[str]:
        """Return what the summary should say beside the lanes."""
        notes = [] if self.graphs is None else self.graphs.describe()
        if self.uncached_calls:
            notes.append(
                f"{self.uncached_calls} calls came from outside of the pipeline that the cache is "
                f"enabled on and ran without it"
            )
        if self.loops > 1:
            notes.append(f"the pipeline denoised {self.loops} times, the last time is shown")
        if self.partial_calls:
            notes.append(f"{self.partial_calls} calls left blocks out and ran without the cache")
        notes += [
            f"{count} steps were full since {why}" for why, count in self.forced.items() if count
        ]
        return [f"{type(self.module).__name__}: {note}" for note in notes]

    def _note_uncached_call(self) -> None:
        self.uncached_calls += 1
        if self.uncached_calls == 1:
            warnings.warn(
                f"{type(self.module).__name__} was called outside of a call of the pipeline that "
                f"dbcache was enabled on, and runs without the cache; enable the pipeline that "
                f"calls it, or the transformer itself, or call dbcache.refresh_context first",
                stacklevel=3,
            )


def handle_of(target: object) -> Any:
    """Return the handle that `enable` left on a transformer or pipeline, None without."""
    return getattr(target, "__dict__", {}).get(HANDLE)
