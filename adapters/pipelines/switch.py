"""Switches the cache on and off, as transactions: all of it, or nothing."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.patching.derived_class import plain_class
from dbcache.adapters.patching.transaction import ABSENT, Transaction
from dbcache.adapters.patching.whole_compile import wrappers_in
from dbcache.adapters.pipelines.cached_pipeline import CachedPipeline, request_class
from dbcache.adapters.pipelines.exchanged import setup_for
from dbcache.adapters.requests.cached_transformer import (
    HANDLE,
    CachedTransformer,
    handle_of,
    transformer_handle,
)
from dbcache.adapters.requests.enabled import Enabled
from dbcache.adapters.requests.notices import tell
from dbcache.adapters.requests.setup import Setup

_SWITCHING = threading.RLock()
"""Held while the cache is switched on or off, from when the present state is read."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _SWITCHING._at_fork_reinit())  # type: ignore[attr-defined]


def _one_at_a_time(switch: Callable[..., None]) -> Callable[..., None]:
    """Return a function that waits until no other thread is in one of these."""

    @functools.wraps(switch)
    def alone(*args: Any, **kwargs: Any) -> None:
        with _SWITCHING:
            switch(*args, **kwargs)

    return alone


@_one_at_a_time
def switch_on(
    pipe: Any, setups: Sequence[Setup], max_requests: int, wrappers: Sequence[Any] = ()
) -> None:
    """Switch the cache on, for calls of a pipeline or, where `pipe` is None, for all others.

    Args:
        pipe: the pipeline; it is given a class whose calls are requests.
        setups: of its transformers.
        max_requests: how many requests of each may be open at once.
        wrappers: what `torch.compile` made of the transformers.

    Raises:
        ValueError: a transformer is compiled as one graph.
    """
    handles = [transformer_handle(setup.module) for setup in setups]
    pairs = list(zip(handles, setups, strict=True))
    for handle, setup in pairs:
        handle.patches_in_use(None if setup.patches is None else setup.patches.functor)
        _check_goes_with_others(pipe, handle.enabled, setup)
        handle.compiled.check(wrappers)
    tell(setups)
    with Transaction() as transaction:
        for handle, setup in pairs:
            old = handle.enabled.latest
            if old is not None:
                setup.inherit(old)
            if setup.sharding is not None:
                transaction.do(setup.sharding.install, setup.sharding.remove)
        pipeline = None if pipe is None else CachedPipeline(pipe, pairs)
        _leave(transaction, pipe, handles)
        for handle, setup in pairs:
            if pipeline is None:
                new = handle.enabled._replace(alone=setup, latest=setup, max_requests=max_requests)
            else:
                new = handle.enabled.with_owner(pipeline, setup, max_requests)
            compiled = handle.compiled
            transaction.do(functools.partial(compiled.move, wrappers), compiled.undo)
            _change(transaction, handle, new)
        if pipeline is not None:
            pipeline.exchanged.follow = _follow
            transaction.set(pipe.__dict__, HANDLE, pipeline)
            transaction.set_class(pipe, request_class(plain_class(pipe)))
    for handle in handles:
        handle.begin_anew(None)


def _leave(transaction: Transaction, pipe: Any, kept: Sequence[CachedTransformer]) -> None:
    """Let a pipeline that was enabled before leave those of its transformers that are not kept."""
    before = None if pipe is None else pipe.__dict__.get(HANDLE)
    for handle, _ in () if before is None else before.transformers:
        if not any(handle is one for one in kept):
            _change(transaction, handle, handle.enabled.without_owner(pipe))


def _follow(pipeline: CachedPipeline) -> CachedPipeline:
    """Switch the cache on for transformers that a pipeline has in place of others since.

    Returns:
        The handle of the pipeline from now on: the same one where it has no others, or where none
        of them could be cached with the same settings (`Exchanged.refused` says why).
    """
    with pipeline.exchanged.lock:
        current = pipeline.pipe.__dict__.get(HANDLE)
        if current is None or current is pipeline:
            return _with_exchanged(pipeline)
    return current.exchanged.follow(current)


def _with_exchanged(pipeline: CachedPipeline) -> CachedPipeline:
    exchanged, pipe = pipeline.exchanged, pipeline.pipe
    others = exchanged.found()
    if not others:
        return pipeline
    setups = [setup for _, setup in pipeline.transformers]
    exchanged.refused, followed = {}, set()
    for i, part in others.items():
        try:
            setups[i] = setup_for(unwrap(part), setups[i])
            followed.add(i)
        except (AttributeError, TypeError, ValueError) as error:
            exchanged.refused[i] = str(error)
    if not followed:
        return pipeline
    most = pipeline.transformers[0][0].enabled.max_requests
    try:
        switch_on(pipe, setups, most, wrappers_in(list(vars(pipe).values())))
    except (RuntimeError, ValueError) as error:
        exchanged.refused |= dict.fromkeys(followed, str(error))
        return pipeline
    new: CachedPipeline = pipe.__dict__[HANDLE]
    new.exchanged.names = exchanged.names
    new.exchanged.refused, new.exchanged.followed = exchanged.refused, followed
    return new


def _check_goes_with_others(pipe: Any, enabled: Enabled, setup: Setup) -> None:
    """Raise a ValueError if another pipeline needs the transformer otherwise than `setup` does.

    Settings, and which blocks run, are each pipeline's own; the module itself is shared.
    """
    owners = [(owner(), own) for owner, own in enabled.owners]
    others = [own for owner, own in owners if owner is not None and owner.pipe is not pipe]
    if pipe is not None and enabled.alone is not None:
        others.append(enabled.alone)
    for other in others:
        functors = [x.patches and x.patches.functor for x in (other, setup)]
        what = None
        if functors[0] is not functors[1]:
            what = "patch_functor"
        elif _spreads(other) != _spreads(setup):
            what = "parallelism_config"
        elif other.attention != setup.attention:
            what = "attention_backend"
        if what is not None:
            raise ValueError(
                f"enable: pipelines that share a {type(setup.module).__name__} must have the same "
                f"{what}, which changes the model itself, got another one; give both the same, or "
                f"call dbcache.disable on the transformer first"
            )


def _spreads(setup: Setup) -> bool:
    return setup.sharding is not None and setup.sharding.spreads


@_one_at_a_time
def switch_off(parts: Sequence[Any]) -> None:
    """Switch the cache off on enabled pipelines and transformers; other owners keep theirs."""
    with Transaction() as transaction:
        for part in parts:
            handle = handle_of(part)
            if isinstance(handle, CachedPipeline):
                for transformer, _ in handle.transformers:
                    _change(transaction, transformer, transformer.enabled.without_owner(part))
                transaction.set_class(part, plain_class(part))
                transaction.set(part.__dict__, HANDLE, ABSENT)
            elif handle is not None:
                pipelines = [owner() for owner, _ in handle.enabled.owners]
                _change(transaction, handle, Enabled())
                for pipeline in pipelines:
                    if pipeline is not None and not any(t.is_on for t, _ in pipeline.transformers):
                        transaction.set_class(pipeline.pipe, plain_class(pipeline.pipe))
                        transaction.set(pipeline.pipe.__dict__, HANDLE, ABSENT)


@_one_at_a_time
def replace_setups(handles: Sequence[CachedTransformer], setups: Sequence[Setup]) -> None:
    """Let new requests go by other setups, in place of the latest ones."""
    with Transaction() as transaction:
        for handle, setup in zip(handles, setups, strict=True):
            old, enabled = handle.setup, handle.enabled
            owners = tuple((o, setup if own is old else own) for o, own in enabled.owners)
            alone = setup if enabled.alone is old else enabled.alone
            new = enabled._replace(alone=alone, owners=owners, latest=setup)
            _change(transaction, handle, new)
            for owner, own in owners:
                pipeline = owner()
                if pipeline is not None and own is setup:
                    before = list(pipeline.transformers)
                    pairs = [(h, setup if h is handle else one) for h, one in before]
                    transaction.do(_assign(pipeline, pairs), _assign(pipeline, before))


def _assign(pipeline: CachedPipeline, pairs: list[tuple[Any, Any]]) -> Callable[[], None]:
    def assign() -> None:
        pipeline.transformers = pairs

    return assign


def _change(transaction: Transaction, handle: CachedTransformer, new: Enabled) -> None:
    before = handle.enabled
    transaction.do(lambda: handle.change(new), lambda: handle.change(before))
