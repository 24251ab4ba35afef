"""Pipelines that go on after their call: those that yield what they have, and those to be awaited.

The request of such a call lasts until the work ends, and is active only while the pipeline works.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractContextManager, closing
from typing import Any

from dbcache.adapters.requests.context import active

Opened = Callable[[], AbstractContextManager[Any]]


def continued(output: Any, opened: Opened) -> Any:
    """Return what a pipeline's call returns, whose work belongs to a request where it goes on.

    Args:
        output: what the pipeline returned.
        opened: opens the call's requests for as long as the context lasts; gives the call.
    """
    if isinstance(output, Generator):
        return _streamed(output, opened)
    return _awaited(output, opened) if isinstance(output, Coroutine) else output


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


async def _awaited(output: Coroutine[Any, Any, Any], opened: Opened) -> Any:
    with opened() as call, active(call.requests):
        return await output
