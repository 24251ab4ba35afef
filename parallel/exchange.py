"""The two all-to-alls of Ulysses attention, with any head count and any lengths, in bf16 or fp8.

    to_heads:   (B, S_rank, H, D)  ->  (B, S, H_rank, D)     before attention
    to_tokens:  (B, S, H_rank, D)  ->  (B, S_rank, H, D)     after it

Where the ranks divide heads and tokens evenly, one launch of `fp8_pack` changes the layout (and
quantises) for all ranks; else one per rank, and the message has splits of different sizes. Nothing
is padded. An exchange is posted and waited for apart, so that others, and work, go on meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dbcache.kernels.distributed.fp8_pack import Split, fp8_pack, fp8_unpack, sections
from dbcache.parallel.mesh import Axis


class Pending:
    """An exchange under way; keeps its buffers alive until it is over."""

    def __init__(self, work: Any, sent: torch.Tensor, finish: Callable[[], torch.Tensor]) -> None:
        self._work = work
        self._sent: torch.Tensor | None = sent
        self._finish = finish

    def wait(self) -> torch.Tensor:
        """Return what arrived. On a GPU the host does not wait, the stream does."""
        self._work.wait()
        self._sent = None
        return self._finish()


def to_heads(
    x: torch.Tensor, axis: Axis, tokens: Sequence[int], heads: Sequence[int], *, float8: bool
) -> Pending:
    """Post the exchange of this rank's tokens with all heads for all tokens with its heads.

    Args:
        x: (B, tokens[rank], sum(heads), D), any strides.
        axis: the Ulysses group.
        tokens: how many tokens each rank has.
        heads: how many heads each rank gets.
        float8: send e4m3 with a scale per token and head.
    """
    batch, _, _, width = x.shape
    own = heads[axis.rank]
    shapes = [(batch, size, own, width) for size in tokens]
    return _exchange(x, axis, heads, shapes, "heads", float8)


def to_tokens(
    x: torch.Tensor, axis: Axis, tokens: Sequence[int], heads: Sequence[int], *, float8: bool
) -> Pending:
    """Post the inverse of `to_heads`: `x` is (B, sum(tokens), heads[rank], D)."""
    batch, _, _, width = x.shape
    own = tokens[axis.rank]
    shapes = [(batch, own, size, width) for size in heads]
    return _exchange(x, axis, tokens, shapes, "sequence", float8)


def _exchange(
    x: torch.Tensor,
    axis: Axis,
    parts: Sequence[int],
    shapes: Sequence[tuple[int, int, int, int]],
    scatter: Split,
    float8: bool,
) -> Pending:
    """Send each rank its part of a dimension of `x`; receive a tensor of `shapes` from each.

    The parts that arrive are joined along the other dimension.
    """
    x = x.detach()
    gather: Split = "sequence" if scatter == "heads" else "heads"
    at = 1 if gather == "sequence" else 2
    whole = list(shapes[0])
    whole[at] = sum(shape[at] for shape in shapes)
    dtype = x.dtype
    if len(set(parts)) == len(set(shapes)) == 1:
        sent = fp8_pack(x, world=axis.size, scatter=scatter, quantize=float8)
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=axis.group, async_op=True)
        return Pending(work, sent, lambda: fp8_unpack(received, whole, gather=gather, dtype=dtype))

    pieces = x.split(list(parts), 2 if scatter == "heads" else 1)
    counts = [_packed_size(piece.shape, float8) for piece in pieces]
    sizes = [_packed_size(shape, float8) for shape in shapes]
    sent = x.new_empty(sum(counts), dtype=torch.uint8 if float8 else dtype)
    for part, piece in zip(sent.split(counts), pieces, strict=True):
        if not float8:
            part.view(piece.shape).copy_(piece)
        elif piece.numel():
            part.copy_(fp8_pack(piece, world=1, scatter="heads")[0])
    received = sent.new_empty(sum(sizes))
    work = dist.all_to_all_single(received, sent, sizes, counts, group=axis.group, async_op=True)

    def finish() -> torch.Tensor:
        arrived = zip(received.split(sizes), shapes, strict=True)
        return torch.cat([_unpack(part, shape, dtype) for part, shape in arrived], at)

    return Pending(work, sent, finish)


def _packed_size(shape: Sequence[int], float8: bool) -> int:
    """Return how many elements a rank is sent of a tensor of a shape."""
    *rows, width = shape
    return sections(math.prod(rows), width)[1] if float8 else math.prod(shape)


def _unpack(
    part: torch.Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> torch.Tensor:
    if part.dtype != torch.uint8:
        return part.view(shape)
    if part.numel() == 0:
        return part.new_empty(shape, dtype=dtype)
    return fp8_unpack(part[None], shape, gather="sequence", dtype=dtype)
