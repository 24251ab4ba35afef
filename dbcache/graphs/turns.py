"""Requests that replay recordings of one pool: one step at a time, on whatever streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Turns:
    """Lets a GPU end the replayed step of another stream first: recordings share a pool."""

    def __init__(self) -> None:
        self._stream: Any = None

    @contextlib.contextmanager
    def __call__(self, tensors: list[torch.Tensor]) -> Iterator[None]:
        """Hold while a step on `tensors` is recorded or replayed, on the current stream."""
        device = next((x.device for x in tensors if x.is_cuda), None)
        if device is None:
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        try:
            yield
        finally:
            self._stream = stream
