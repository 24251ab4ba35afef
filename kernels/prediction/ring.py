"""What `commit` and `predict` ask of a ring of snapshots, and of the two of a step."""

import torch
from torch import Tensor

from dbcache.kernels.common import e4m3
from dbcache.kernels.common.checks import check_tensor
from dbcache.kernels.common.lane_state import MAX_SLOTS
from dbcache.kernels.common.select import DTYPES, invalid

Stream = tuple[str, Tensor, Tensor, Tensor | None, Tensor | None]
"""Name, activations, ring, its scales if it is fp8, and its weights if they are taken."""


def check_rings(op: str, *streams: Stream) -> None:
    """Raise unless ring, scales and weights fit each stream, and all of them fit one launch."""
    _, h, first, _, _ = streams[0]
    for name, x, ring, scales, weights in streams:
        if x.dtype not in DTYPES:
            raise invalid(op, f"{name} must have a dtype of {DTYPES}", x.dtype)
        if ring.shape[1:] != x.shape or not 1 <= ring.shape[0] <= MAX_SLOTS:
            must = f"the ring of {name} must be (K, *{name}.shape) with 1 <= K <= {MAX_SLOTS}"
            raise invalid(op, must, tuple(ring.shape), tuple(x.shape))
        dtypes = DTYPES if scales is None else (torch.uint8,)
        if ring.dtype not in dtypes or not ring.is_contiguous() or ring.device != x.device:
            which = f"the ring of {name}{' with scales' * (scales is not None)}"
            must = f"{which} must be contiguous, on one device with {name}, with a dtype of"
            raise invalid(op, f"{must} {dtypes}", ring.dtype, ring.stride(), ring.device)
        if scales is not None:
            e4m3.check_scales(op, name, ring, scales)
        if weights is not None:
            form = (torch.float32, (MAX_SLOTS,), x.device)
            check_tensor(op, f"the weights of {name}", weights, *form)
        if (ring.dtype == torch.uint8) != (first.dtype == torch.uint8):
            raise invalid(op, "both rings must be fp8 or none", first.dtype, ring.dtype)
        if ring.shape[0] != first.shape[0] or x.device != h.device:
            must = "both streams must share the slots and the device"
            raise invalid(op, must, (first.shape[0], h.device), (ring.shape[0], x.device))
