"""The output of a run of skipped blocks: its input plus their stored residuals.

    out = h + R_first + ... + R_{first + count - 1}

One launch for hidden and encoder states, however many blocks: it reads h and `count` residuals and
writes out once, so the kernel is bound by memory bandwidth. The sum is float32, rounded once, where
block after block would round (and move h) `count` times.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbcache.kernels.common.checks import check_shared, check_tensor
from dbcache.kernels.common.launches import BLOCK, cdiv
from dbcache.kernels.common.op import op
from dbcache.kernels.common.select import DTYPES, Impl, invalid, without_gradient


def add_residuals(
    h: Tensor,
    residuals: Tensor,
    first: int,
    count: int,
    encoder: Tensor | None = None,
    encoder_residuals: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return ``h + residuals[first : first + count].sum(0)``, and the same for the encoder states.

    Args:
        h: what the first block is called with, any shape, float32, float16 or bfloat16. Any
            strides; copied first where not contiguous.
        residuals: (M, *h.shape), contiguous, of the dtype of `h`; others of its M entries are not
            read and may hold anything.
        first: first block of the run, at least 0.
        count: blocks in it, at least 1, with ``first + count <= M``.
        encoder: second stream, as `h`, of any size of its own; its residuals come with it.
        encoder_residuals: as `residuals`, with the same M.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; see `select`.

    Returns:
        New contiguous tensors, None for a stream that was not given. No gradient, no
        synchronisation.

    Raises:
        ValueError: shapes, dtypes, devices or the run do not fit.
    """
    blocks = residuals.shape[0]
    if not (first >= 0 and count >= 1 and first + count <= blocks):
        must = f"the run must have at least 1 of the {blocks} blocks"
        raise invalid("add_residuals", must, f"first = {first}", f"count = {count}")
    _check("h", h, residuals, blocks)
    if encoder is None:
        return _add_residuals(impl, [h], [residuals], first, count)[0], None
    if encoder_residuals is None:
        raise ValueError("add_residuals: encoder must come with its residuals, got None")
    _check("encoder", encoder, encoder_residuals, blocks)
    streams, added = [h, encoder], [residuals, encoder_residuals]
    out, encoder_out = _add_residuals(impl, streams, added, first, count)
    return out, encoder_out


def _check(name: str, x: Tensor, stored: Tensor, blocks: int) -> None:
    its = f"the residuals of {name}"
    if x.dtype != stored.dtype or x.dtype not in DTYPES:
        check_shared("add_residuals", "dtype", **{name: x, its: stored})
    form = (x.dtype, (blocks, *x.shape), x.device)
    check_tensor("add_residuals", its, stored, *form, contiguous=True)


@without_gradient
def add_residuals_reference(
    streams: Sequence[Tensor], residuals: Sequence[Tensor], first: int, count: int
) -> list[Tensor]:
    """Plain PyTorch, the meaning of `add_residuals`: an output per stream."""
    outputs = []
    for x, stored in zip(streams, residuals, strict=True):
        total = x.float()
        for added in stored[first : first + count]:
            total = total + added
        outputs.append(total.to(x.dtype).contiguous())
    return outputs


def _outputs(streams, *_):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in streams]


@op(add_residuals_reference, like="streams", fake=_outputs)
def _add_residuals(streams, residuals, first, count):
    outputs = _outputs(streams)
    h, added, out = streams[0].contiguous(), residuals[0], outputs[0]
    encoder = encoder_added = encoder_out = None
    if len(streams) > 1:
        encoder, encoder_added, encoder_out = streams[1].contiguous(), residuals[1], outputs[1]
    size, encoder_size = h.numel(), 0 if encoder is None else encoder.numel()
    parts, encoder_parts = cdiv(size, BLOCK), cdiv(encoder_size, BLOCK)
    if parts + encoder_parts:
        _add_residuals_kernel[(parts + encoder_parts,)](
            h, added, out, size, first, count, parts,
            encoder, encoder_added, encoder_out, encoder_size,
            BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return outputs


@triton.jit(do_not_specialize=["first", "count", "blocks"])
def _add_residuals_kernel(
    h_ptr, residuals_ptr, out_ptr, size, first, count, blocks,
    encoder_ptr, encoder_residuals_ptr, encoder_out_ptr, encoder_size, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `blocks` programs take the hidden states, the others the encoder states."""
    block = tl.program_id(0)
    if encoder_ptr is None or block < blocks:
        _add_block(h_ptr, residuals_ptr, out_ptr, size, first, count, block, BLOCK)
    else:
        _add_block(
            encoder_ptr, encoder_residuals_ptr, encoder_out_ptr, encoder_size, first, count,
            block - blocks, BLOCK,
        )  # fmt: skip


@triton.jit
def _add_block(h_ptr, residuals_ptr, out_ptr, size, first, count, block, BLOCK: tl.constexpr):
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    total = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for i in range(count):
        added_ptr = residuals_ptr + tl.cast(size, tl.int64) * (first + i)
        total += tl.load(added_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)
