"""A transformer with the cache on: who enabled it, its open requests, and its replaced methods.

Only the instance is touched: `forward` and `cache_context` get an entry in its `__dict__`, and
while a forward runs so do the lists of blocks. All that belongs to a request is in `Request`.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from dbcache.adapters.blocks.block_list import BlockList
from dbcache.adapters.blocks.views import under_way, without_shown
from dbcache.adapters.patching.announced import announce, unannounced
from dbcache.adapters.patching.attention import AttentionInForce
from dbcache.adapters.patching.instance_method import InstanceMethod
from dbcache.adapters.patching.patch_functor import Patches
from dbcache.adapters.patching.whole_compile import COMPILED, WholeCompile, uncompiled
from dbcache.adapters.requests import counts
from dbcache.adapters.requests.context import ACTIVE, Place, Suspended, around, current_place
from dbcache.adapters.requests.enabled import Enabled
from dbcache.adapters.requests.hot_swap import watched_loading
from dbcache.adapters.requests.lane_pool import LaneSet
from dbcache.adapters.requests.notices import OUTSIDE, Tally
from dbcache.adapters.requests.open_requests import OpenRequests, living
from dbcache.adapters.requests.record import RequestRecord, Totals
from dbcache.adapters.requests.request import CachedForward, Request, Views
from dbcache.adapters.requests.reruns import Reruns
from dbcache.adapters.requests.setup import Setup
from dbcache.lanes.sharding import Sharding
from dbcache.notices import say

HANDLE = "_dbcache"
"""Name of the attribute by which a transformer or pipeline knows its handle."""

TOLD = ("step_index", "num_inference_steps")
"""Options of `cache_context` that tell the step; older versions of diffusers do not take them."""

KEEPS_FUNCTOR = (
    "enable: {who} must keep its patch_functor while requests are under way, got another one; wait "
    "for them to end, or close them"
)

OFF = (
    "{who}: the cache must be enabled on it, got one that was switched off meanwhile; call "
    "dbcache.enable"
)

REPLICATE = "_replicate_for_data_parallel"
"""Method by which nn.DataParallel copies a module onto another GPU."""

REPLICATED = (
    "nn.DataParallel copies the model onto each GPU on each call, and copies have no cache; call "
    "its .module, and run a process for each GPU (docs/parallel.md), or call dbcache.disable first"
)


class CachedTransformer:
    """The handle of a transformer; there is one as long as the cache is on, or a request is open.

    Args:
        module: the transformer.

    Attributes:
        enabled: who enabled it, with which setup.
        closed: the request that closed last; `totals` are the sums over all closed ones.
        uncached_calls: forwards outside of a request, which ran without the cache.
        tally: how many requests began and ended, and what they said.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.views = Views()
        self.reruns = Reruns()
        self.enabled = Enabled()
        self.closed: RequestRecord | None = None
        self.totals = Totals()
        self.uncached_calls = 0
        self.tally = Tally()
        self.implicit: weakref.WeakKeyDictionary[Place, Request] = weakref.WeakKeyDictionary()
        self.setups: list[Setup] = []
        self.compiled = WholeCompile(module, lambda: _lists(self.setups))
        self._functor: Patches | None = None
        self._sharding: Sharding | None = None
        self._attention = AttentionInForce()
        self._open = OpenRequests(module, lambda: None if self.is_on else self._fit())
        self._patches: list[InstanceMethod] = []
        counts.watch(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the transformer has its cache off

    @property
    def is_on(self) -> bool:
        """Whether new requests use the cache."""
        return self.enabled.latest is not None

    @property
    def setup(self) -> Setup:
        """The setup of the last `enable`; raises a RuntimeError where the cache is off."""
        latest = self.enabled.latest
        if latest is None:
            raise RuntimeError(OFF.format(who=type(self.module).__name__))
        return latest

    def change(self, enabled: Enabled) -> None:
        """Take over who enabled the transformer; requests under way go on as they began.

        Doing this twice is the same as once, also where it was cut short by an exception.
        """
        with self._open.locked():
            self.enabled = enabled
            self.tally.said.clear()
            for place in living(self.implicit):
                request = self.implicit.get(place)
                follows = request is not None and request.renew is not None
                if not self.is_on or (follows and enabled.alone is None):
                    self.implicit.pop(place, None)
            self._fit()
            announce(self.module, self.setup.config if self.is_on else None)

    def _fit(self) -> None:
        """Install or remove the methods, and drop setups that nothing needs."""
        wanted = None
        while wanted is not (now := self.is_on or len(self._open) > 0):
            wanted = now  # the collector may end a request in between
            self._fit_to(wanted=wanted)

    def _fit_to(self, *, wanted: bool) -> None:
        own = self.module.__dict__
        self._apply(self.setup.patches if self.is_on else self._functor if wanted else None)
        if self.is_on or not wanted:  # else requests under way go on with it
            self._attention.fit(self.setup.attention if self.is_on else None)
        if wanted:
            own[HANDLE] = self
            own["__getstate__"] = functools.partial(_copied_state, self)
            if any(patch.is_lost for patch in self._patches):
                self._remove_patches()  # others took their place, or an exception cut this short
            self._patches = self._patches or self._make_patches()
            for patch in self._patches:
                patch.install()
        self._keep_setups()
        (self.compiled.move if wanted else self.compiled.undo)()
        if self.is_on:
            self._sharding = self.setup.sharding
        if not wanted:
            self._remove_patches()
            sharding, self._sharding = self._sharding, None
            if sharding is not None:
                sharding.remove()
            if own.get(HANDLE) is self:
                own.pop("__getstate__", None)
                del own[HANDLE]

    def _apply(self, functor: Patches | None) -> None:
        """Put what a functor changed in the place of what another one did."""
        if functor is not self._functor:
            self._remove_patches()
            old, self._functor = self._functor, functor
            if old is not None:
                old.undo()
            if functor is not None:
                functor.redo()

    @property
    def is_lost(self) -> bool:
        """Whether calls do not come here, since someone has replaced `forward` since."""
        return self.is_on and any(patch.is_lost for patch in self._patches)

    def _come_back(self) -> None:
        """Take the place of `forward` again where someone has replaced it since."""
        if self.is_lost:
            self.resume()

    def _keep_setups(self) -> None:
        """Tell setups that are needed where they work, and end those that are not."""
        current = self.enabled.setups + [request.setup for request in self.under_way()]
        for setup in current:
            setup.bind(self.views, self.original, self.reruns)
        for setup in self.setups:
            setup.retire(current)
        self.setups = current

    def _remove_patches(self) -> None:
        for patch in self._patches:
            patch.remove()
        self._patches = []

    def suspend(self) -> None:
        """Leave the module as it is without the cache, until `resume`."""
        with self._open.locked():
            self._remove_patches()
            self._apply(None)

    def resume(self) -> None:
        """Go on after `suspend`."""
        with self._open.locked():
            self._fit()

    def patches_in_use(self, functor: Any) -> Patches | None:
        """Return what a `patch_functor` changed for requests that are open; None without any.

        Raises:
            RuntimeError: they are open, and theirs is not `functor`.
        """
        own = None if self._functor is None else self._functor.functor
        if len(self._open) and own is not functor:
            raise RuntimeError(KEEPS_FUNCTOR.format(who=type(self.module).__name__))
        return self._functor if len(self._open) else None

    def _make_patches(self) -> list[InstanceMethod]:
        patches: list[InstanceMethod] = [CachedForward(self)]
        if hasattr(self.module, "cache_context"):
            patches.append(InstanceMethod(self.module, "cache_context", self.cache_context))
        patches += watched_loading(self.module, self.implicit)
        return [*patches, InstanceMethod(self.module, REPLICATE, _refuse_replicas)]

    @property
    def original(self) -> Callable[..., Any]:
        """The module's own forward; not compiled as a whole."""
        patches = self._patches  # none where another thread has switched the cache off meanwhile
        return uncompiled(patches[0].original) if patches else self.module.forward

    def open(self, request: Request, *, waits: bool) -> None:
        """Count a request in; it is closed where another thread has switched the cache off.

        Args:
            request: that of a pipeline's call, or one that the user started.
            waits: where as many are open as there may be, wait for one to close; see `add`.
        """
        with self._open.locked():
            if self.module.__dict__.get(HANDLE) is self:
                self._open.add(request, self.enabled.max_requests, waits=waits)
                request.notices.tally = self.tally
                self._come_back()
            else:
                request.is_closed = True

    def has_room(self) -> bool:
        """Whether the call of a pipeline need not wait for another request to close."""
        return self._open.has_room(self.enabled.max_requests)

    def close(self, request: Request) -> None:
        """Close a request, and keep its record."""
        with self._open.locked():
            self._finish(request)
            self._open.remove(request)
            self._fit()

    def current(self) -> Any:
        """Return the request, or `RowGroup`, that a forward called here belongs to, if to any."""
        request = ACTIVE.get().get(id(self.module))
        if request is not None and not isinstance(request, Suspended) and not request.is_closed:
            return request
        # else the request of this thread or task that nobody started
        request, setup = self.implicit.get(current_place()), self.enabled.alone
        if request is None and setup is not None:
            request = self._begin_here(setup)
        return request

    def _begin_here(self, setup: Setup) -> Request:
        """Begin a request of this thread or task that nobody started."""
        renew = None if self.enabled.alone is None else self._alone
        request = self.implicit[current_place()] = Request(setup, follows=False, renew=renew)
        request.notices.tally = self.tally
        return request

    def under_way(self) -> list[Request]:
        """Return the open requests, and those that nobody started."""
        implicit = (self.implicit.get(place) for place in living(self.implicit))
        return [*self._open, *(request for request in implicit if request is not None)]

    def refresh(self, setup: Setup) -> None:
        """Begin a new request here, with the settings of `setup`, for calls without a pipeline."""
        request = around(self.module)
        if request is not None and not request.is_closed:
            request.move_to(setup)
        else:
            self.begin_anew(setup)

    def begin_anew(self, setup: Setup | None) -> None:
        """End the request of this thread or task that nobody started, and begin another one.

        Args:
            setup: of the new request; None: it begins with the next forward, if at all. A graph
                captured by the user goes on with its lanes.
        """
        with self._open.locked():
            old = self.implicit.pop(current_place(), None)
            lanes = LaneSet([]) if old is None else old.lane_set
            if old is not None:
                self._finish(old)
            new = setup or (self.enabled.alone if lanes.is_captured else None)
            if new is not None:
                request = self._begin_here(new)
                if lanes.runs:  # reset now: the next step may be captured, or replayed
                    request.lane_set = new.take_lanes(lanes.shape)
            self._fit()

    def _alone(self) -> Setup | None:
        return self.enabled.alone

    def _finish(self, request: Request) -> None:
        request.close()
        self.reruns.clean()
        if request.record is not None and request.record.calls:
            self.closed = request.record
            self.totals.add(request.record)
            counts.add(self, request.record)

    def run_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward outside of all requests."""
        self.uncached_calls += 1
        if self.uncached_calls == 1 and self.is_on:
            say(OUTSIDE.format(who=type(self.module).__name__))
        with under_way(None):
            return self.original(*args, **kwargs)

    @contextmanager
    def cache_context(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Take the name of the guidance branch, and the step, from the pipeline's own context."""
        patches = self._patches  # none where another thread has switched the cache off meanwhile
        if not patches or self.module.__dict__.get("forward") is not patches[0]:
            self._come_back()
            patches = self._patches
        request, told = self.current(), {k: kwargs[k] for k in TOLD if k in kwargs}
        original: Any = patches[1].original if patches else self.module.cache_context
        if not _takes_options(getattr(original, "__func__", original)):  # a method holds the model
            kwargs = {name: value for name, value in kwargs.items() if name not in told}
        named = nullcontext() if request is None else request.clock.named(name, **told)
        with original(name, *args, **kwargs), named:
            yield


def _copied_state(handle: CachedTransformer) -> dict[str, Any]:
    """Return what copies and pickles of the module are made of: no trace of the cache."""
    own = unannounced(handle.module.__dict__)
    for patch in handle._patches:
        patch.clean(own)
    for name in (HANDLE, "__getstate__", COMPILED):  # no copy of a module is compiled
        own.pop(name, None)
    return without_shown(handle.module, own)


def _lists(setups: list[Setup]) -> list[BlockList]:
    stacks = [stack for setup in setups for stack in setup.spec.stacks]
    return [block_list for stack in stacks for block_list in stack.lists]


@functools.cache
def _takes_options(cache_context: Callable[..., Any]) -> bool:
    kinds = {p.kind for p in inspect.signature(cache_context).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def _refuse_replicas() -> None:
    raise RuntimeError(REPLICATED)


def handle_of(target: object) -> Any:
    """Return the handle of a transformer or pipeline whose cache is on, None without."""
    handle = getattr(target, "__dict__", {}).get(HANDLE)
    return handle if handle is not None and handle.is_on else None


def transformer_handle(module: torch.nn.Module) -> CachedTransformer:
    """Return the handle of a transformer, a new one where there is none."""
    handle = module.__dict__.get(HANDLE)
    return CachedTransformer(module) if handle is None else handle
