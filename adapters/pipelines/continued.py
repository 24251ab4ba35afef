"""Pipelines that go on after their call: those that yield what they have, and those to be awaited.

The request of such a call lasts until the work ends, and is active only while the pipeline works.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import AbstractContextManager, aclosing, closing
from typing import Any

from dbcache.adapters.requests.context import active

Opened = Callable[[], AbstractContextManager[Any]]

PAUSE = 0.01
"""Seconds after which a task looks again whether a request has closed."""


def begins_later(function: Callable[..., Any]) -> bool:
    """Whether a call of a function runs nothing of it, but returns what does."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    flags = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    return code is not None and bool(code.co_flags & flags)


def continued(output: Any, opened: Opened, has_room: Callable[[], bool]) -> Any:
    """Return what a pipeline's call returns, whose work belongs to a request where it goes on.

    Args:
        output: what the pipeline returned.
        opened: opens the call's requests for as long as the context lasts; gives the call.
        has_room: says whether that need not wait for other calls to end.
    """
    if isinstance(output, Generator):
        return _streamed(output, opened)
    if isinstance(output, AsyncGenerator):
        return _streamed_to_tasks(output, opened, has_room)
    return _awaited(output, opened, has_room) if isinstance(output, Coroutine) else output


def _streamed(steps: Generator[Any, Any, Any], opened: Opened) -> Generator[Any, Any, Any]:
    sent = None
    with closing(steps), opened() as call:
        while True:
            with active(call.requests):
                try:
                    output = steps.send(sent)
                except StopIteration as end:
                    return end.value
            sent = yield output


async def _awaited(
    output: Coroutine[Any, Any, Any], opened: Opened, has_room: Callable[[], bool]
) -> Any:
    await _room(has_room)
    with opened() as call, active(call.requests):
        return await output


async def _streamed_to_tasks(
    steps: AsyncGenerator[Any, Any], opened: Opened, has_room: Callable[[], bool]
) -> AsyncGenerator[Any, Any]:
    sent = None
    async with aclosing(steps):
        await _room(has_room)
        with opened() as call:
            while True:
                with active(call.requests):
                    try:
                        output = await steps.asend(sent)
                    except StopAsyncIteration:
                        return
                sent = yield output


async def _room(has_room: Callable[[], bool]) -> None:
    """Let other tasks run, which may have to end before this one."""
    while not has_room():
        await asyncio.sleep(PAUSE)
