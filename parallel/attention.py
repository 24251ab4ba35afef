"""Attention over a sequence that is split over ranks, and its place in diffusers' processors.

Of each attention module that the model's row names, the processor is replaced by a copy whose
`__call__` is the same code with two names of its module bound anew: `dispatch_attention_fn` and the
`scaled_dot_product_attention` of `torch.nn.functional`. Nothing else of the processor changes, and
no other model sees it.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from dbcache.kernels._select import invalid
from dbcache.parallel.exchange import to_heads, to_tokens
from dbcache.parallel.local_attention import attend
from dbcache.parallel.mesh import Mesh, all_gather_single
from dbcache.parallel.ring import gathered_keys, ring_attention
from dbcache.parallel.sequence import Shards, all_gather, part_sizes
from dbcache.parallelism_config import ContextOptions

_SDPA = "scaled_dot_product_attention"


class SequenceAttention:
    """Attention over sequences that `shards` has split: Ulysses, ring, or both.

    Args:
        mesh: the ranks.
        options: how they exchange.
        shards: how the sequences lie on the ranks.
    """

    def __init__(self, mesh: Mesh, options: ContextOptions, shards: Shards) -> None:
        self.mesh = mesh
        self.options = options
        self.shards = shards
        self._agreed: set[tuple[int, ...]] = set()

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        streams: Sequence[str],
        scale: float | None,
        backend: Any,
    ) -> torch.Tensor:
        """Return the attention of this rank's queries over the keys of all ranks.

        Args:
            q: (B, S, H, D), the rank's tokens of `streams`.
            k: as `q`.
            v: as `q`.
            mask: which of the rank's keys count, (B, 1, 1, S), or which pairs of query and key do,
                boolean (B, 1, S, S), where it is the outer product of one vector with itself.
            streams: names of the streams that make up the sequence.
            scale: None for ``D ** -0.5``.
            backend: diffusers' name of the attention within a rank; None: the active one.

        Raises:
            ValueError: shapes that differ, a mask of another form, or ranks that disagree.
        """
        sizes = self.shards.sizes(streams)
        key_mask, query_mask = self._masks(q, k, mask, sizes)
        self._check_agreement(q, sizes, mask)
        gathered = self._gather_mask(key_mask, sizes)
        ulysses, heads = self.mesh.ulysses, q.shape[2]
        if ulysses.size == 1:
            out = self._over_ring(q, k, v, gathered, sizes, scale, backend)
        else:
            parts = self._head_parts(heads)
            first = self.mesh.ring.rank * ulysses.size
            tokens = sizes[first : first + ulysses.size]
            float8 = self.options.experimental_ulysses_float8
            pending = [to_heads(x, ulysses, tokens, parts, float8=float8) for x in (q, k, v)]
            q, k, v = (exchange.wait() for exchange in pending)
            out = self._over_ring(q, k, v, gathered, sizes, scale, backend)
            out = to_tokens(out, ulysses, tokens, parts, float8=float8).wait()
        if query_mask is not None:
            # the plain processors give 0 where a query sees no key
            out = out * query_mask[:, :, None, None]
        return out

    def _over_ring(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        sizes: Sequence[int],
        scale: float | None,
        backend: Any,
    ) -> torch.Tensor:
        """Attention of the heads that are here; each rank of the ring has a part of the tokens."""
        ring, group = self.mesh.ring, self.mesh.ulysses.size
        lengths = [sum(sizes[i : i + group]) for i in range(0, len(sizes), group)]
        if ring.size > 1 and self.options.ring_rotate_method == "p2p":
            name = _backend_name(backend)
            return ring_attention(
                q,
                k,
                v,
                None if mask is None else mask.split(lengths, 1),
                ring,
                lengths,
                lambda q, k, v, mask: attend(q, k, v, mask, scale, name),
                to_float32=self.options.ring_convert_to_fp32,
            )
        if ring.size > 1:
            k, v = gathered_keys(k, v, ring, lengths)
        return attention_dispatch.dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask[:, None, None, :],
            scale=scale,
            backend=backend,
        )

    def _head_parts(self, heads: int) -> list[int]:
        """Return how many heads each rank of the Ulysses group gets."""
        size = self.mesh.ulysses.size
        if heads % size and not self.options.experimental_ulysses_anything:
            raise ValueError(must_divide_heads(self.shards.who, heads, size))
        return part_sizes(heads, size)

    def _masks(
        self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, sizes: Sequence[int]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return which of the rank's keys and of its queries count, (B, S) each, None for all."""
        who, own = self.shards.who, sizes[self.mesh.sequence.rank]
        if q.shape != k.shape or q.shape[1] != own:
            must = f"queries and keys of a split sequence must be this rank's {own} tokens"
            raise invalid(who, must, tuple(q.shape), tuple(k.shape))
        if mask is None:
            return None, None
        batch = q.shape[0]
        if mask.ndim == 4 and mask.shape[1:] == (1, 1, own):
            return mask[:, 0, 0].expand(batch, own), None
        if mask.ndim == 4 and mask.shape[1:] == (1, own, own) and mask.dtype == torch.bool:
            pairs = mask[:, 0].expand(batch, own, own)
            return pairs.any(1), pairs.any(2)
        must = f"the attention mask of a split sequence must be (B, 1, 1, {own})"
        raise invalid(who, must, tuple(mask.shape), mask.dtype)

    def _gather_mask(self, mask: torch.Tensor | None, sizes: Sequence[int]) -> torch.Tensor | None:
        """Return the mask of the keys that come to this rank, in their order, (B, T)."""
        if mask is None:
            return None
        dtype = mask.dtype
        whole = all_gather(
            mask.to(torch.uint8) if dtype == torch.bool else mask, 1, sizes, self.mesh.sequence
        )
        return whole.to(dtype)

    def _check_agreement(
        self, q: torch.Tensor, sizes: Sequence[int], mask: torch.Tensor | None
    ) -> None:
        """Raise on all ranks if their sequences do not fit together.

        Compares them where this rank meets them for the first time; only then the host waits.
        """
        batch, _, heads, width = q.shape
        facts = (*sizes, batch, heads, width, q.dtype.itemsize, int(mask is not None))
        if facts in self._agreed:
            return
        axis = self.mesh.sequence
        own = torch.tensor([facts], dtype=torch.int64, device=q.device)
        everyone = own.new_empty((axis.size, own.shape[1]))
        all_gather_single(everyone, own, axis.group)
        given = [tuple(row) for row in everyone.tolist()]
        if len(set(given)) > 1:
            must = (
                "all ranks that share a sequence must call the model with inputs of the same shape "
                "and dtype (here: tokens of each rank, batch, heads, width, bytes, masked)"
            )
            raise invalid(self.shards.who, must, *given)
        self._agreed.add(facts)


def must_divide_heads(who: str, heads: int, size: int) -> str:
    """Return the error for heads that a Ulysses group cannot split evenly."""
    return (
        f"{who}: ulysses_size must divide the {heads} attention heads that a rank has, got {size}; "
        f"set experimental_ulysses_anything=True in parallel_kwargs, or use ring_size"
    )


def _backend_name(backend: Any) -> str:
    if backend is None:
        backend, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    return str(getattr(backend, "value", backend))


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
        call = getattr(kind, "__call__", None)  # noqa: B004
        names = set(_names(call.__code__)) if isinstance(call, types.FunctionType) else set()
        bound: dict[str, Any] = {}
        if isinstance(call, types.FunctionType) and not issubclass(kind, torch.nn.Module):
            for name in names:
                value = call.__globals__.get(name)
                if value is attention_dispatch.dispatch_attention_fn:
                    bound[name] = self.dispatch
                elif value is F and _SDPA in names:
                    bound[name] = _Functional(self.functional)
        if not isinstance(call, types.FunctionType) or not bound:
            raise ValueError(
                f"{self.attention.shards.who}: an attention processor must call diffusers' "
                f"dispatch_attention_fn or F.{_SDPA} itself, got {kind.__name__}; set the "
                f"model's default processors"
            )
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


def _names(code: types.CodeType) -> list[str]:
    """Return the names that a function's code looks up, those of its inner functions included."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return [*code.co_names, *(name for one in inner for name in _names(one))]
