"""The output of the skipped blocks, predicted as a weighted sum over the ring of residuals.

    out = h + sum_j weights[j] * ring[j]       (replace: without h)

One launch for hidden and encoder states. It reads h and those slots whose weight is not 0, and
writes out, so the kernel is bound by memory bandwidth.
"""

import torch
import triton
import triton.language as tl

from dbcache.kernels._select import (
    DTYPES,
    Impl,
    invalid,
    is_traced,
    select,
    without_gradient,
)
from dbcache.kernels.lane_state import MAX_SLOTS

BLOCK = 2048


def predict(
    h: torch.Tensor,
    ring: torch.Tensor,
    weights: torch.Tensor,
    encoder: torch.Tensor | None = None,
    encoder_ring: torch.Tensor | None = None,
    encoder_weights: torch.Tensor | None = None,
    *,
    replace: bool = False,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ``h + sum_j weights[j] * ring[j]``, and the same for the encoder states.

    The sum is float32, rounded once to the dtype of `h`. A slot whose weight is exactly 0 does not
    contribute, whatever it holds; it may be uninitialised.

    Args:
        h: activations before the skipped blocks, any shape, float32, float16 or bfloat16. Any
            strides; copied first where not contiguous.
        ring: (K, *h.shape), contiguous, 1 <= K <= MAX_SLOTS, one of the dtypes.
        weights: float32 (MAX_SLOTS,), the first K are used.
        encoder: second stream, as `h`, of any size of its own; its ring and weights come with it.
        encoder_ring: as `ring`, with the same K.
        encoder_weights: as `weights`.
        replace: leave `h` out of the sum, for rings that hold outputs rather than residuals.
        impl: ``"triton"``, ``"reference"`` (plain PyTorch, any device), or ``"auto"``, which takes
            Triton for tensors on a GPU. An implementation asked for by name never falls back.

    Returns:
        New contiguous tensors, or None for a stream that was not given. No gradient. The
        reference reads the weights on the host, which synchronises if they are on a GPU; Triton
        does not.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check("h", h, ring, weights)
    if encoder is not None:
        if encoder_ring is None or encoder_weights is None:
            raise ValueError("predict: encoder must come with its ring and weights, got None")
        _check("encoder", encoder, encoder_ring, encoder_weights)
        if encoder_ring.shape[0] != ring.shape[0] or encoder.device != h.device:
            must = "both streams must share the slots and the device"
            got = ((ring.shape[0], h.device), (encoder_ring.shape[0], encoder.device))
            raise invalid("predict", must, *got)
    if is_traced(h):
        with torch.no_grad():
            out = _predict_op(
                h, ring, weights, encoder, encoder_ring, encoder_weights, replace, impl
            )
        return out[0], out[1] if encoder is not None else None
    if select(impl, h) == "triton":
        return _predict_triton(h, ring, weights, encoder, encoder_ring, encoder_weights, replace)
    return predict_reference(
        h, ring, weights, encoder, encoder_ring, encoder_weights, replace=replace
    )


@without_gradient
def predict_reference(
    h: torch.Tensor,
    ring: torch.Tensor,
    weights: torch.Tensor,
    encoder: torch.Tensor | None = None,
    encoder_ring: torch.Tensor | None = None,
    encoder_weights: torch.Tensor | None = None,
    *,
    replace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Plain PyTorch, the meaning of `predict`."""
    out = _weighted_sum(h, ring, weights, replace)
    if encoder is None or encoder_ring is None or encoder_weights is None:
        return out, None
    return out, _weighted_sum(encoder, encoder_ring, encoder_weights, replace)


def _weighted_sum(
    h: torch.Tensor, ring: torch.Tensor, weights: torch.Tensor, replace: bool
) -> torch.Tensor:
    """Add up in float32, one op per slot that is used; h first, so that it needs no pass."""
    total = None if replace else h.float()
    for slot, weight in enumerate(weights.tolist()[: ring.shape[0]]):
        if weight == 0:
            continue
        if total is None:
            total = ring[slot].float() * weight
        else:
            total = torch.add(total, ring[slot], alpha=weight)
    if total is None:
        return torch.zeros(h.shape, dtype=h.dtype, device=h.device)
    out = total.to(h.dtype)
    return out.clone(memory_format=torch.contiguous_format) if total is h else out.contiguous()


def _check(name: str, h: torch.Tensor, ring: torch.Tensor, weights: torch.Tensor) -> None:
    if ring.shape[1:] != h.shape or not 1 <= ring.shape[0] <= MAX_SLOTS:
        must = f"the ring of {name} must be (K, *{name}.shape) with 1 <= K <= {MAX_SLOTS}"
        raise invalid("predict", must, tuple(ring.shape), tuple(h.shape))
    if h.dtype not in DTYPES or ring.dtype not in DTYPES:
        must = f"{name} and its ring must have a dtype of {DTYPES}"
        raise invalid("predict", must, h.dtype, ring.dtype)
    if not ring.is_contiguous():
        raise invalid("predict", f"the ring of {name} must be contiguous", ring.stride())
    if weights.dtype != torch.float32 or weights.shape != (MAX_SLOTS,):
        must = f"the weights of {name} must be float32 ({MAX_SLOTS},)"
        raise invalid("predict", must, weights.dtype, tuple(weights.shape))
    if not (h.device == ring.device == weights.device):
        must = f"{name}, its ring and its weights must be on one device"
        raise invalid("predict", must, h.device, ring.device, weights.device)


def _predict_triton(
    h: torch.Tensor,
    ring: torch.Tensor,
    weights: torch.Tensor,
    encoder: torch.Tensor | None,
    encoder_ring: torch.Tensor | None,
    encoder_weights: torch.Tensor | None,
    replace: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    h = h.contiguous()
    out = torch.empty_like(h)
    blocks, encoder_blocks, encoder_size = triton.cdiv(h.numel(), BLOCK), 0, 0
    encoder_out = None
    if encoder is not None:
        encoder = encoder.contiguous()
        encoder_out = torch.empty_like(encoder)
        encoder_size = encoder.numel()
        encoder_blocks = triton.cdiv(encoder_size, BLOCK)
    if blocks + encoder_blocks:
        with torch.cuda.device_of(h):
            _predict_kernel[(blocks + encoder_blocks,)](
                h, ring, weights, out, h.numel(), blocks,
                encoder, encoder_ring, encoder_weights, encoder_out, encoder_size,
                K=ring.shape[0], REPLACE=replace, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out, encoder_out


@torch.library.custom_op("dbcache::predict", mutates_args=())
def _predict_op(
    h: torch.Tensor,
    ring: torch.Tensor,
    weights: torch.Tensor,
    encoder: torch.Tensor | None,
    encoder_ring: torch.Tensor | None,
    encoder_weights: torch.Tensor | None,
    replace: bool,
    impl: str,
) -> list[torch.Tensor]:
    streams = (h, ring, weights, encoder, encoder_ring, encoder_weights)
    if select(impl, h) == "triton":
        out = _predict_triton(*streams, replace)
    else:
        out = predict_reference(*streams, replace=replace)
    return [x for x in out if x is not None]


@_predict_op.register_fake
def _(
    h: torch.Tensor,
    ring: torch.Tensor,
    weights: torch.Tensor,
    encoder: torch.Tensor | None,
    encoder_ring: torch.Tensor | None,
    encoder_weights: torch.Tensor | None,
    replace: bool,
    impl: str,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in (h, encoder) if x is not None]


@triton.jit
def _predict_kernel(
    h_ptr,
    ring_ptr,
    weights_ptr,
    out_ptr,
    size,
    blocks,
    encoder_ptr,
    encoder_ring_ptr,
    encoder_weights_ptr,
    encoder_out_ptr,
    encoder_size,
    K: tl.constexpr,
    REPLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first `blocks` programs take the hidden states, the others the encoder states."""
    block = tl.program_id(0)
    if encoder_ptr is None or block < blocks:
        _predict_block(h_ptr, ring_ptr, weights_ptr, out_ptr, size, block, K, REPLACE, BLOCK)
    else:
        _predict_block(
            encoder_ptr,
            encoder_ring_ptr,
            encoder_weights_ptr,
            encoder_out_ptr,
            encoder_size,
            block - blocks,
            K,
            REPLACE,
            BLOCK,
        )


@triton.jit
def _predict_block(
    h_ptr,
    ring_ptr,
    weights_ptr,
    out_ptr,
    size,
    block,
    K: tl.constexpr,
    REPLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        weight = tl.load(weights_ptr + slot)
        # a slot of weight 0 is not read: it saves the bytes, and it may hold anything
        used = offsets < tl.where(weight != 0.0, size, 0)
        slot_ptr = ring_ptr + tl.cast(size, tl.int64) * slot
        total += weight * tl.load(slot_ptr + offsets, mask=used, other=0.0).to(tl.float32)
    if not REPLACE:
        total += tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)
