"""Attention within a rank that also returns its log-sum-exp, which ring attention merges by.

    out = softmax(scale * q k^T + mask) v,    lse = log sum exp(scale * q k^T + mask)

PyTorch's kernels give the log-sum-exp, but not through its public function; each is one `aten` op.
Plain PyTorch stands in where none fits.
"""

from __future__ import annotations

import math

import torch

from dbcache.kernels.common.select import invalid

Partial = tuple[torch.Tensor, torch.Tensor]
"""Output (B, S, H, D) and log-sum-exp, float32 (B, S, H), natural logarithm."""

_ATEN = torch.ops.aten


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    backend: str = "native",
) -> Partial:
    """Return the attention of `q` over `k` and `v`, and its log-sum-exp.

    Args:
        q: (B, S, H, D), any strides.
        k: (B, T, H, D).
        v: (B, T, H, D).
        mask: which keys count, (B, T): True where they do, or a number that is added.
        scale: None for ``D ** -0.5``.
        backend: diffusers' name: "native" chooses; "_native_flash", "_native_efficient",
            "_native_cudnn", "_native_math".

    Raises:
        ValueError: a backend that cannot return a log-sum-exp here.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = None if mask is None else _as_bias(mask, q.dtype)
    if q.shape[2] == 0 or k.shape[2] == 0:
        out, lse = _plain(q, k, v, bias, scale)
    else:
        out, lse = _KERNELS[_choose(q, bias, backend)](q, k, v, bias, scale)
    if mask is not None:
        # kernels disagree on what to return where no key counts; the merge asks for -inf
        counts = mask if mask.dtype == torch.bool else mask > -math.inf
        lse = lse.masked_fill(~counts.any(-1)[:, None, None], -math.inf)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a key mask as what is added to the scores, (B, 1, 1, T)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, -math.inf
        )
    return mask.to(dtype)[:, None, None, :]


def _choose(q: torch.Tensor, bias: torch.Tensor | None, backend: str) -> str:
    if backend != "native":
        on_gpu = ("_native_flash", "_native_efficient", "_native_cudnn")
        names = ("native", "_native_math", *(on_gpu if q.device.type == "cuda" else ()))
        if backend not in names:
            raise invalid(
                "ring attention",
                f"the attention backend must return a log-sum-exp on {q.device.type}, one of "
                f"{names}, or set ring_rotate_method='allgather'",
                repr(backend),
            )
        return backend
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda" or q.shape[-1] % 8 or q.shape[-1] > 256:
        return "_native_math"
    if bias is None and q.dtype in (torch.float16, torch.bfloat16):
        return "_native_flash"
    return "_native_efficient"


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> Partial:
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return (weights @ v.float()).to(q.dtype), lse


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> Partial:
    shape = (q.shape[0], 1, q.shape[2], k.shape[2])
    mask = None if bias is None else bias.expand(shape)
    out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=mask, scale=scale
    )
    return out, lse.float()


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> Partial:
    if bias is not None:
        raise invalid("ring attention", "_native_flash takes no mask", "one")
    out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out, lse[..., : q.shape[2]]


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> Partial:
    if bias is not None:
        # the kernel reads rows of the bias in steps of 16 bytes
        padded = bias.new_zeros((*bias.shape[:3], -(-bias.shape[3] // 16) * 16))
        padded[..., : bias.shape[3]] = bias
        bias = padded[..., : bias.shape[3]].expand(*q.shape[:3], -1)
    out, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(
        q, k, v, bias, compute_log_sumexp=True, scale=scale
    )
    return out, lse[..., : q.shape[2]]


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> Partial:
    bias = None if bias is None else bias.expand(*q.shape[:3], -1)
    out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(
        q, k, v, bias, compute_log_sumexp=True, scale=scale
    )
    return out, (lse[..., 0] if lse.ndim == 4 else lse)[..., : q.shape[2]]


_KERNELS = {
    "cpu": _cpu,
    "_native_math": _plain,
    "_native_flash": _flash,
    "_native_efficient": _efficient,
    "_native_cudnn": _cudnn,
}
