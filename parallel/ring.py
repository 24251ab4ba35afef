"""Ring attention: keys and values visit every rank, queries stay (arXiv:2310.01889).

    out, lse = merge over the ranks r of attend(q, k_r, v_r)

Keys and values travel as one message. While attention runs on one block of them, the next one is
received and the current one sent on, so the transfer is hidden where attention takes longer. The
blocks may differ in length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from dbcache.kernels.distributed.merge_attention import merge_attention
from dbcache.parallel.local_attention import Partial
from dbcache.parallel.mesh import Axis
from dbcache.parallel.sequence import all_gather

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], Partial]


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masks: Sequence[torch.Tensor] | None,
    axis: Axis,
    sizes: Sequence[int],
    attend: Attend,
    *,
    to_float32: bool,
) -> torch.Tensor:
    """Return the attention of `q` over the keys and values of all ranks of the ring.

    Args:
        q: this rank's queries, (B, S, H, D).
        k: its keys, (B, sizes[rank], H, D).
        v: its values, as `k`.
        masks: of each rank's keys, (B, T); None where all count.
        axis: the ring.
        sizes: how many keys each rank has.
        attend: attention within a rank, of (q, k, v, mask).
        to_float32: add up in float32; the result has the dtype of `q` either way.
    """
    block, owner = torch.stack((k.detach(), v.detach())), axis.rank
    dtype = torch.float32 if to_float32 else q.dtype
    total: Partial | None = None
    for step in range(axis.size):
        is_last = step == axis.size - 1
        arriving = None if is_last else _rotate(block, (owner - 1) % axis.size, sizes, axis)
        if sizes[owner]:
            partial = attend(q, block[0], block[1], None if masks is None else masks[owner])
            if total is None:
                total = partial
            else:
                total = merge_attention(*total, *partial, out_dtype=dtype)
        if arriving is not None:
            works, received = arriving
            for work in works:
                work.wait()
            block, owner = received, (owner - 1) % axis.size
    assert total is not None
    return total[0].to(q.dtype)


def _rotate(
    block: torch.Tensor, coming: int, sizes: Sequence[int], axis: Axis
) -> tuple[list[dist.Work], torch.Tensor]:
    """Start to send a block to the next rank, and to receive that of rank `coming`."""
    after = axis.ranks[(axis.rank + 1) % axis.size]
    before = axis.ranks[(axis.rank - 1) % axis.size]
    batch, _, heads, width = block.shape[1:]
    received = block.new_empty((2, batch, sizes[coming], heads, width))
    operations = []
    if block.numel():
        operations.append(dist.P2POp(dist.isend, block, after, axis.group))
    if received.numel():
        operations.append(dist.P2POp(dist.irecv, received, before, axis.group))
    return (dist.batch_isend_irecv(operations) if operations else []), received


def gathered_keys(
    k: torch.Tensor, v: torch.Tensor, axis: Axis, sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of all ranks of the ring, (B, sum(sizes), H, D) each."""
    # tokens first, as they arrive: nothing is copied once more
    both = all_gather(torch.stack((k.movedim(1, 0), v.movedim(1, 0)), 1), 0, sizes, axis)
    k, v = both.movedim(0, 2)
    return k, v
