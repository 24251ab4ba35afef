"""Weights of LoRA that diffusers writes into an adapter that is there (``hotswap=True``).

Nothing on the host shows such a change but the call that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dbcache.adapters.patching.instance_method import InstanceMethod
from dbcache.adapters.requests.context import Place, around, current_place
from dbcache.adapters.requests.request import Request
from dbcache.adapters.signals.lora import CHANGED

LOAD = "load_lora_adapter"
"""Method of a transformer by which diffusers loads adapters, and exchanges their weights."""


def watched_loading(
    module: torch.nn.Module, implicit: Mapping[Place, Request]
) -> list[InstanceMethod]:
    """Return the method that tells the request under way of adapters that are loaded; or none.

    Args:
        module: the transformer.
        implicit: its requests that nobody started, by thread or task.
    """
    if not hasattr(module, LOAD):
        return []

    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return method.original(*args, **kwargs)
        finally:
            request = around(module) or implicit.get(current_place())
            if isinstance(request, Request) and not request.is_closed:
                request.force_full(CHANGED)

    method = InstanceMethod(module, LOAD, load)
    return [method]
