"""The place of attention in diffusers' processors, taken per model instance.

Of each attention module that the model's row names, the processor is replaced by a copy whose
`__call__` is the same code with two names of its module bound anew: `dispatch_attention_fn` and the
`scaled_dot_product_attention` of `torch.nn.functional`. Nothing else of the processor changes, and
no other model sees it.

diffusers offers no place to put another attention in: its backends are a closed enumeration, its
`_parallel_config` leads to its own context parallel, and the processors of CogVideoX, ConsisID,
CogView and PixArt call PyTorch's function, which knows neither. All call one of the two by its
module's name; `reach` refuses a processor that does not, before anything is changed.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from dbcache.kernels.common.select import invalid
from dbcache.parallel.attention import SequenceAttention

_SDPA = "scaled_dot_product_attention"


class _Functional:
    """`torch.nn.functional` with another `scaled_dot_product_attention`."""

    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        self.scaled_dot_product_attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


class Site:
    """What the processors of one kind of attention module call in place of attention.

    Args:
        attention: of the model.
        streams: what makes up the sequence there.
    """

    def __init__(self, attention: SequenceAttention, streams: Sequence[str]) -> None:
        self.attention = attention
        self.streams = tuple(streams)
        self._classes: dict[type, type] = {}

    def dispatch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        """Stand in for `dispatch_attention_fn`; layout (B, S, H, D)."""
        self._reject(dropout_p, is_causal, enable_gqa)
        return self.attention(query, key, value, attn_mask, self.streams, scale, backend)

    def functional(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Stand in for PyTorch's `scaled_dot_product_attention`; layout (B, H, S, D)."""
        self._reject(dropout_p, is_causal, enable_gqa)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        backend = self.attention.options.attention_backend
        out = self.attention(q, k, v, attn_mask, self.streams, scale, backend)
        return out.transpose(1, 2)

    def _reject(self, dropout_p: float, is_causal: bool, enable_gqa: bool) -> None:
        if dropout_p or is_causal or enable_gqa:
            must = (
                "attention over a split sequence must have no dropout, causal mask or shared keys"
            )
            raise invalid(self.attention.shards.who, must, dropout_p, is_causal, enable_gqa)

    def replacement(self, processor: Any) -> Any:
        """Return a copy of a processor that calls the functions here.

        Raises:
            ValueError: its attention cannot be reached.
        """
        kind = type(processor)
        if kind not in self._classes:
            self._classes[kind] = self._rebound(kind)
        new = copy.copy(processor)
        new.__class__ = self._classes[kind]
        return new

    def _rebound(self, kind: type) -> type:
        call, found = reach(kind, self.attention.shards.who)
        mine = {"dispatch": self.dispatch, "functional": _Functional(self.functional)}
        bound = {name: mine[which] for name, which in found.items()}
        new = types.FunctionType(
            call.__code__,
            {**call.__globals__, **bound},
            call.__name__,
            call.__defaults__,
            call.__closure__,
        )
        new.__kwdefaults__ = call.__kwdefaults__
        new.__annotations__ = call.__annotations__
        return type(kind.__name__, (kind,), {"__call__": new, "__module__": kind.__module__})


def reach(kind: type, who: str) -> tuple[types.FunctionType, dict[str, str]]:
    """Return the `__call__` of a processor class, and the names by which it calls attention.

    Raises:
        ValueError: it does not call it itself.
    """
    call, found = getattr(kind, "__call__", None), {}  # noqa: B004
    if isinstance(call, types.FunctionType) and not issubclass(kind, torch.nn.Module):
        names = set(_names(call.__code__))
        for name in names:
            value = call.__globals__.get(name)
            if value is attention_dispatch.dispatch_attention_fn:
                found[name] = "dispatch"
            elif value is F and _SDPA in names:
                found[name] = "functional"
    if not isinstance(call, types.FunctionType) or not found:
        raise ValueError(
            f"{who}: an attention processor must call diffusers' dispatch_attention_fn or "
            f"F.{_SDPA} itself, got {kind.__name__}; set the model's default processors"
        )
    return call, found


def _names(code: types.CodeType) -> list[str]:
    """Return the names that a function's code looks up, those of its inner functions included."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return [*code.co_names, *(name for one in inner for name in _names(one))]
