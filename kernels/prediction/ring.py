"""What `commit` and `predict` ask of a ring of snapshots, and of the two of a step."""

import torch
from torch import Tensor

from dbcache.kernels.common import e4m3
from dbcache.kernels.common.lane_state import MAX_SLOTS
from dbcache.kernels.common.select import DTYPES, invalid


def check_ring(
    op: str,
    name: str,
    x: Tensor,
    ring: Tensor,
    scales: Tensor | None,
    weights: Tensor | None = None,
) -> None:
    """Raise unless `ring`, its `weights` and, of fp8, its `scales` fit a stream `x`."""
    if x.dtype not in DTYPES:
        raise invalid(op, f"{name} must have a dtype of {DTYPES}", x.dtype)
    if ring.shape[1:] != x.shape or not 1 <= ring.shape[0] <= MAX_SLOTS:
        must = f"the ring of {name} must be (K, *{name}.shape) with 1 <= K <= {MAX_SLOTS}"
        raise invalid(op, must, tuple(ring.shape), tuple(x.shape))
    dtypes = DTYPES if scales is None else (torch.uint8,)
    if ring.dtype not in dtypes or not ring.is_contiguous() or ring.device != x.device:
        which = f"the ring of {name}{' with scales' * (scales is not None)}"
        must = f"{which} must be contiguous, on one device with {name}, with a dtype of {dtypes}"
        raise invalid(op, must, ring.dtype, ring.stride(), ring.device)
    if scales is not None:
        e4m3.check_scales(op, name, ring, scales)
    if weights is not None:
        if weights.dtype != torch.float32 or weights.shape != (MAX_SLOTS,):
            must = f"the weights of {name} must be float32 ({MAX_SLOTS},)"
            raise invalid(op, must, weights.dtype, tuple(weights.shape))
        if x.device != weights.device:
            must = f"{name} and its weights must be on one device"
            raise invalid(op, must, x.device, weights.device)


def check_both(op: str, h: Tensor, ring: Tensor, encoder: Tensor, encoder_ring: Tensor) -> None:
    """Raise unless the hidden and the encoder states may be handled in one launch."""
    if (ring.dtype == torch.uint8) != (encoder_ring.dtype == torch.uint8):
        raise invalid(op, "both rings must be fp8 or none", ring.dtype, encoder_ring.dtype)
    if ring.shape[0] != encoder_ring.shape[0] or h.device != encoder.device:
        must = "both streams must share the slots and the device"
        got = (ring.shape[0], h.device), (encoder_ring.shape[0], encoder.device)
        raise invalid(op, must, *got)
