"""Attention over a sequence that is split over ranks: Ulysses, ring, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_dispatch

from dbcache.config.parallelism import ContextOptions
from dbcache.kernels.common.select import invalid
from dbcache.parallel.exchange import Pending, to_heads, to_tokens
from dbcache.parallel.local_attention import attend
from dbcache.parallel.mesh import Mesh, all_gather_single
from dbcache.parallel.ring import gathered_keys, ring_attention
from dbcache.parallel.sequence import Shards, all_gather, part_sizes


@dataclass(frozen=True)
class Call:
    """What all tensors of one attention have in common.

    Attributes:
        sizes: how many tokens each rank has.
        heads: how many heads each rank of the Ulysses group gets.
        mask: which keys count, of all that come to this rank, (B, T); None: all.
        query_mask: which of this rank's queries see a key, (B, S); None: all.
    """

    sizes: list[int]
    heads: list[int]
    mask: torch.Tensor | None
    query_mask: torch.Tensor | None


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
        if k.shape != q.shape or v.shape != q.shape:
            must = "queries, keys and values of a split sequence must have the same shape"
            raise invalid(self.shards.who, must, *(tuple(x.shape) for x in (q, k, v)))
        call = self.begin(q, mask, streams)
        if self.mesh.ulysses.size > 1:
            pending = [self.post(x, call) for x in (q, k, v)]
            q, k, v = (exchange.wait() for exchange in pending)
        return self.finish(q, k, v, call, scale, backend)

    def begin(self, x: torch.Tensor, mask: torch.Tensor | None, streams: Sequence[str]) -> Call:
        """Check the shape of the queries, keys or values, and gather the mask.

        Args:
            x: one of them, (B, S, H, D).
            mask: as of `__call__`.
            streams: as of `__call__`.
        """
        sizes = self.shards.sizes(streams)
        key_mask, query_mask = self._masks(x, mask, sizes)
        heads = self._head_parts(x.shape[2])
        self._check_agreement(x, sizes, mask)
        return Call(sizes, heads, self._gather_mask(key_mask, sizes), query_mask)

    def post(self, x: torch.Tensor, call: Call) -> Pending:
        """Send queries, keys or values to where their heads are attended to."""
        float8 = self.options.experimental_ulysses_float8
        return to_heads(x, self.mesh.ulysses, self._tokens(call), call.heads, float8=float8)

    def finish(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        scale: float | None,
        backend: Any,
    ) -> torch.Tensor:
        """Attend, and bring the output back to this rank's tokens, (B, S, H, D)."""
        out = self._over_ring(q, k, v, call.mask, call.sizes, scale, backend)
        if self.mesh.ulysses.size > 1:
            out = self.bring_back(out, call)
        if call.query_mask is not None:
            # the plain processors give 0 where a query sees no key
            out = out * call.query_mask[:, :, None, None]
        return out

    def bring_back(self, out: torch.Tensor, call: Call) -> torch.Tensor:
        """Exchange the output of some heads for this rank's tokens with all heads."""
        float8 = self.options.experimental_ulysses_float8
        tokens = self._tokens(call)
        return to_tokens(out, self.mesh.ulysses, tokens, call.heads, float8=float8).wait()

    def _tokens(self, call: Call) -> list[int]:
        """Return how many tokens each rank of the Ulysses group has."""
        first = self.mesh.ring.rank * self.mesh.ulysses.size
        return call.sizes[first : first + self.mesh.ulysses.size]

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
        self, x: torch.Tensor, mask: torch.Tensor | None, sizes: Sequence[int]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return which of the rank's keys and of its queries count, (B, S) each, None for all."""
        who, own = self.shards.who, sizes[self.mesh.sequence.rank]
        if x.shape[1] != own:
            must = f"attention over a split sequence must be over this rank's {own} tokens"
            raise invalid(who, must, x.shape[1])
        if mask is None:
            return None, None
        batch = x.shape[0]
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
