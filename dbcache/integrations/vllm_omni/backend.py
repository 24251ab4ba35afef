"""The cache backend that vLLM-Omni's workers drive.

A request is one call of the pipeline's `forward`, so that it begins at the right place even where
the engine does not tell the steps and never calls `refresh`. In step-wise mode it is one request of
the engine, from its first `denoise_step` to `post_decode`. All are requests of
`dbcache.start_request`.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch

import dbcache
from dbcache.adapters.patching.instance_method import InstanceMethod
from dbcache.adapters.requests.cached_transformer import handle_of
from dbcache.adapters.requests.request_handle import RequestHandle
from dbcache.integrations import prometheus
from dbcache.integrations.no_ops import NoOps
from dbcache.integrations.vllm_omni.models import split_steps, target_of, transformers
from dbcache.integrations.vllm_omni.settings import Settings, as_config

LOGGER = logging.getLogger("vllm_omni.dbcache")  # below the engine's own, which has the handlers

BRANCHES = ("cond", "uncond")
"""Names of the calls of a step, in their order; further ones are numbered."""


class Call:
    """The request that a forward of the pipeline, or a step of one, belongs to.

    Attributes:
        handles: one per transformer.
        step: number of the step, None where the time that the transformer is given tells it.
        place: calls of the step so far; None outside of what calls the guidance branches.
    """

    def __init__(self, handles: Sequence[RequestHandle], step: int | None) -> None:
        self.handles = handles
        self.step = step
        self.place: int | None = None

    def branch(self) -> AbstractContextManager[None]:
        """Name the guidance branch of the next call."""
        place, self.place = self.place or 0, (self.place or 0) + 1
        return self.named(BRANCHES[place] if place < len(BRANCHES) else f"branch {place + 1}")

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Name the guidance branch of calls inside."""
        with ExitStack() as stack:
            for handle in self.handles:
                stack.enter_context(handle.branch(name, step_index=self.step))
            yield

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let calls inside belong to the requests."""
        with ExitStack() as stack:
            for handle in self.handles:
                stack.enter_context(handle)
            yield


UNMASKED = {"steps_computation_mask": None, "steps_computation_policy": "dynamic"}


class RowsCall(Call):
    """Like `Call`, for a batch of rows of several engine requests, each at a step of its own.

    Attributes:
        rows: the requests of each row, one per transformer.
    """

    def __init__(self, rows: Sequence[Sequence[RequestHandle]]) -> None:
        super().__init__((), None)
        self.rows = rows

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for handles in zip(*self.rows, strict=True):
                stack.enter_context(dbcache.rows([(handle, name) for handle in handles]))
            yield

    @contextmanager
    def active(self) -> Iterator[None]:
        with ExitStack() as stack:
            for handles in zip(*self.rows, strict=True):
                stack.enter_context(dbcache.rows(handles))
            yield


CALL: ContextVar[Call | None] = ContextVar("dbcache_vllm_omni_call", default=None)


class Backend:
    """What the engine's `CacheBackend` has to do, for one pipeline.

    Args:
        cache_config: the engine's config, a dictionary of its options and of those of
            `dbcache.enable`, or None.

    Raises:
        TypeError: an unknown option. ValueError: a value that is not allowed.
    """

    def __init__(self, cache_config: Any = None) -> None:
        self.config = as_config(cache_config)
        self.enabled = False
        self._settings = Settings.of(self.config)
        self._modules: list[torch.nn.Module] = []
        self._patches: list[InstanceMethod] = []
        self._told = threading.local()  # steps of the next request, as the engine told them
        self._stepwise: dict[int, tuple[weakref.ref[Any], list[RequestHandle]]] = {}
        self._scheduler_tells = False
        self._said_together = False
        self._no_ops = NoOps(LOGGER)

    # --- what the engine calls ----------------------------------------------------------------

    def is_enabled(self) -> bool:
        """Say whether the cache is on."""
        return self.enabled

    def enable(self, pipeline: Any) -> None:
        """Switch the cache on, for all denoising modules of a pipeline or, if it raises, none.

        Raises:
            ValueError: a module cannot be cached. RuntimeError: pipeline parallelism.
        """
        if self.enabled:
            self.disable(pipeline)
        modules, groups = transformers(pipeline), groups_of_ranks()
        with ExitStack() as undo:
            for module in modules:
                target = target_of(module, LOGGER)
                dbcache.enable(target, decide_together=groups or None, **self._settings.options)
                undo.callback(dbcache.disable, module)
            undo.pop_all()
        self._modules = modules
        for name, call in (
            ("forward", self._forward),
            ("predict_noise_maybe_with_cfg", self._predict_branches),
            ("predict_noise_with_multi_branch_cfg", self._predict_branches),
            ("predict_noise", self._predict),
            ("scheduler_step", self._scheduler_step),
            ("denoise_step", self._denoise_step),
            ("post_decode", self._post_decode),
        ):
            if callable(getattr(pipeline, name, None)):
                self._wrap(pipeline, name, call)
        self.enabled = True
        for module in modules:
            text = dbcache.strify(module)
            LOGGER.info("dbcache is enabled on %s: %s", type(module).__name__, text)

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Take note of the steps of the next request, and begin it for calls without `forward`."""
        if not self.enabled:
            LOGGER.warning("dbcache is not enabled; refresh did nothing")
            return
        steps = num_inference_steps or None
        self._told.steps = steps
        for module, own in zip(self._modules, self._split(pipeline, steps), strict=True):
            options = self._masked(own)
            dbcache.refresh_context(module, num_inference_steps=own, **options)
            clock = handle_of(module).current().clock  # its branches are found from the calls
            clock.follows, clock.by_time, clock.branches.tells_steps = True, True, False
        if verbose:
            LOGGER.debug("dbcache: the next request has %s steps", steps)

    def disable(self, pipeline: Any) -> None:
        """Switch the cache off: pipeline and modules are as they were."""
        for _, handles in self._stepwise.values():
            self._close(handles, is_whole=False)
        self._stepwise.clear()
        for patch in self._patches:
            patch.remove()
        for module in self._modules:
            dbcache.disable(module)
        self._patches, self._modules, self.enabled = [], [], False

    # --- requests -----------------------------------------------------------------------------

    def _split(self, pipeline: Any, steps: int | None) -> list[int | None]:
        count = len(self._modules)
        return [None] * count if steps is None else split_steps(pipeline, steps, count)

    def _masked(self, steps: int | None) -> dict[str, Any]:
        """Return the options of the named mask for a request; without its steps there is none."""
        masked = self._settings.masked
        return UNMASKED if masked and steps is None else masked

    def _start(self, pipeline: Any, steps: int | None) -> list[RequestHandle]:
        handles = []
        for module, own in zip(self._modules, self._split(pipeline, steps), strict=True):
            options = self._masked(own)
            if own is None:
                own = self._settings.options["cache_config"].num_inference_steps
            handles.append(dbcache.start_request(module, num_inference_steps=own, **options))
        return handles

    def _close(self, handles: Sequence[RequestHandle], *, is_whole: bool = True) -> None:
        """End requests; `is_whole` says whether they ran to their end."""
        for handle in handles:
            summary = handle.summary()
            handle.close()
            if is_whole:
                self._no_ops.look_at(summary)
            LOGGER.debug("dbcache:\n%s", summary)
        if handles:
            prometheus.publish_where_installed()

    def _wrap(self, pipeline: Any, name: str, call: Any) -> None:
        """Let `call(pipeline, original, ...)` run in place of a method of the pipeline."""

        def run(*args: Any, **kwargs: Any) -> Any:
            return call(pipeline, patch.original, *args, **kwargs)

        patch = InstanceMethod(pipeline, name, run)
        patch.install()
        self._patches.append(patch)

    def _forward(self, pipeline: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        steps, self._told.steps = getattr(self._told, "steps", None), None
        handles = self._start(pipeline, steps)
        is_whole = False
        try:
            with _active(Call(handles, 0 if self._scheduler_tells else None)):
                output = original(*args, **kwargs)
            is_whole = True
        finally:
            self._close(handles, is_whole=is_whole)
        return output

    def _predict_branches(self, pipeline: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        call = CALL.get()
        if call is None:
            return original(*args, **kwargs)
        call.place = 0
        try:
            return original(*args, **kwargs)
        finally:
            call.place = None

    def _predict(self, pipeline: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        call = CALL.get()
        if call is None or call.place is None:
            return original(*args, **kwargs)
        with call.branch():
            return original(*args, **kwargs)

    def _scheduler_step(self, pipeline: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        call = CALL.get()
        if call is not None:
            self._scheduler_tells = True  # of this pipeline, so for all later requests
            if call.step is not None:
                call.step += 1
        return original(*args, **kwargs)

    # --- step-wise mode -----------------------------------------------------------------------

    def _denoise_step(
        self, pipeline: Any, original: Any, *args: Any, states: Any = None, **kwargs: Any
    ) -> Any:
        """Run one step of one engine request, or of several in one batch."""
        if not states:
            return original(*args, **kwargs)
        self._close_ended()
        with _active(self._call_of(pipeline, states)):
            return original(*args, states=states, **kwargs)

    def _call_of(self, pipeline: Any, states: Sequence[Any]) -> Call:
        is_each = self._settings.options["cache_config"].batch_reduce == "each"
        if len(states) == 1:  # rows go by the time, and so does a request that may become one
            index = None if is_each else states[0].step_index
            return Call(self._handles_of(pipeline, states[0]), index)
        if not is_each:
            return self._uncached_call(pipeline)
        rows = [[self._handles_of(pipeline, state)] * len(state.latents) for state in states]
        return RowsCall([handles for own in rows for handles in own])

    def _handles_of(self, pipeline: Any, state: Any) -> list[RequestHandle]:
        """Return the requests of an engine request, which begin with its first step."""
        known = self._stepwise.get(id(state))
        if known is None:
            known = weakref.ref(state), self._start(pipeline, state.total_steps or None)
            self._stepwise[id(state)] = known
        return known[1]

    def _uncached_call(self, pipeline: Any) -> Call:
        """Return what the rows of several engine requests run in: all blocks, nothing is kept."""
        if not self._said_together:
            self._said_together = True
            LOGGER.warning(
                "dbcache: steps of several requests in one batch run without the cache, since they "
                'are at different places; set "batch_reduce": "each" in the cache config'
            )
        return Call(self._start(pipeline, None), None)

    def _post_decode(self, pipeline: Any, original: Any, state: Any, *args: Any, **kw: Any) -> Any:
        """End the requests of an engine request: it is decoded when its last step is done."""
        try:
            return original(state, *args, **kw)
        finally:
            _, handles = self._stepwise.pop(id(state), (None, []))
            self._close(handles)

    def _close_ended(self) -> None:
        """Close the requests of engine requests that were given up."""
        for key, (state, handles) in list(self._stepwise.items()):
            if state() is None:
                del self._stepwise[key]
                self._close(handles, is_whole=False)


@functools.cache
def backend_class() -> Any:
    """Return the class of the engine's backends for dbcache; imports the engine."""
    from vllm_omni.diffusion.cache.base import CacheBackend

    return type("DBCacheBackend", (Backend, CacheBackend), {"__doc__": Backend.__doc__})


@contextmanager
def _active(call: Call) -> Iterator[None]:
    """Let forwards belong to the requests of a call."""
    token = CALL.set(call)
    try:
        with call.active():
            yield
    finally:
        CALL.reset(token)


def groups_of_ranks() -> list[Any]:
    """Return the process groups whose ranks must cache the same steps.

    A rank that skips a block would leave the others waiting for its part of the sequence or of the
    weights. Ranks of guidance parallelism run branches of their own.

    Raises:
        RuntimeError: ranks share the layers of a model (pipeline parallelism).
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from vllm.distributed import parallel_state as of_vllm
    from vllm_omni.diffusion.distributed import parallel_state

    stages = parallel_state._PP
    if stages is not None and stages.world_size > 1:
        raise RuntimeError(
            f"dbcache: each rank must have all layers of a model, got a group of "
            f"{stages.world_size} that share them; start the engine without pipeline parallelism"
        )
    groups = (parallel_state._SP, of_vllm._TP)
    return [group.device_group for group in groups if group is not None and group.world_size > 1]
