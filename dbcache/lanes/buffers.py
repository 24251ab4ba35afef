"""Helpers for the tensors of a lane: layout, allocation, and small copies to the host."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import ParamSpec, TypeVar

import torch

Streams = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states, and encoder states where there are any."""

Layout = tuple[object, ...]
"""Shapes, dtypes and device of a step's tensors; a change of it restarts the lane."""

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def outside_inference_mode(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """Let `function` run outside of inference mode, whatever mode the caller is in.

    Lanes outlive a call: a tensor made in inference mode could not be written to outside of it.
    """
    return torch.inference_mode(False)(function)


def layout_of(h_fn: torch.Tensor, encoder: torch.Tensor | None) -> Layout:
    """Return shapes, dtypes and device of a step, which the buffers of a lane must fit."""
    if encoder is None:
        return (h_fn.shape, h_fn.dtype, h_fn.device)
    return (h_fn.shape, h_fn.dtype, h_fn.device, encoder.shape, encoder.dtype)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous buffer of the shape, dtype and device of `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def can_write(*pairs: tuple[torch.Tensor | None, torch.Tensor | None]) -> bool:
    """Whether a kernel may write outputs element by element while it still reads inputs.

    Args:
        pairs: inputs, each with its output, which may be the same memory. All else must lie apart,
            contiguous, and an output must have the shape and the dtype of its input. Without an
            input there is no output.
    """
    spans: list[tuple[int, int]] = []
    for x, out in pairs:
        if x is None:
            continue
        if out is None or (x.shape, x.dtype) != (out.shape, out.dtype):
            return False
        if not (x.is_contiguous() and out.is_contiguous()):
            return False
        spans += {(x.data_ptr(), x.nbytes), (out.data_ptr(), out.nbytes)}
    spans.sort()
    return all(start + size <= after for (start, size), (after, _) in pairwise(spans))


def written(streams: Streams, out: Streams) -> Streams:
    """Return `out`, the second where it is given, with the streams written into it."""
    hidden, encoder = out[0].copy_(streams[0]), streams[1]
    if encoder is not None and out[1] is not None:
        encoder = out[1].copy_(encoder)
    return hidden, encoder


class HostCopy:
    """A buffer in pinned memory, through which the host reads a few numbers of a GPU."""

    def __init__(self) -> None:
        self._held: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Return the content of `x`, of one shape and dtype each time; the next call overwrites it.

        Waits for what was enqueued on the current stream of its GPU, and for nothing else.
        """
        return self.start(x)()

    def start(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Enqueue the copy of `x`; return what waits for it, and for no more, and returns it."""
        if self._held is None:
            self._held = self._make(x)
        host, event = self._held
        host.copy_(x, non_blocking=True)
        event.record(torch.cuda.current_stream(x.device))

        def wait() -> torch.Tensor:
            event.synchronize()
            return host

        return wait

    @staticmethod
    @outside_inference_mode
    def _make(x: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        return host, torch.cuda.Event()
