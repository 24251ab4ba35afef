"""Copies of what a step changes, to go back to after a trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch

from dbcache.lanes.buffers import outside_inference_mode
from dbcache.lanes.lane import Lane
from dbcache.lanes.pruned_lane import PrunedLane

AnyLane = Lane | PrunedLane
"""A lane that caches whole steps, or leaves out single blocks."""


class StepCopy:
    """A copy of all that a step changes in one object, to be written back into the same tensors.

    Args:
        host: has what the host knows, in the attributes that its `HOST` names.
        tensors: returns the tensors that there are, always in the same order. What is added to them
            after the copy stays as it is.
    """

    @outside_inference_mode
    def __init__(self, host: Any, tensors: Callable[[], Sequence[torch.Tensor | None]]) -> None:
        self._host, self._tensors = host, tensors
        self._known = {name: copy(getattr(host, name)) for name in host.HOST}
        self._contents = [None if x is None else x.clone() for x in tensors()]

    @outside_inference_mode
    def restore(self) -> None:
        """Put everything back."""
        for name, value in self._known.items():
            setattr(self._host, name, value)
        for tensor, content in zip(self._tensors(), self._contents, strict=False):
            if tensor is not None and content is not None:
                tensor.copy_(content)
