"""Processors that exchange what is projected while the next projection is computed.

    V = to_v(x)            post V
    Q = rope(norm(to_q(x)))  post Q      V is under way
    K = rope(norm(to_k(x)))  post K      V and Q are
    attend

V goes first, since it needs neither norm nor rotary embedding. The plain processors project all
three and then exchange; here the messages are hidden behind the projections. One class per way in
which a family's processor projects; the arithmetic is that of diffusers' own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from dbcache.parallel.attention import SequenceAttention

Pair = tuple[torch.Tensor, torch.Tensor]


class AsyncProjections(ABC):
    """Base: joint attention over text, then latents.

    Args:
        attention: of the model.
        streams: what makes up the sequence.
    """

    _attention_backend: Any = None

    def __init__(self, attention: SequenceAttention, streams: Sequence[str]) -> None:
        self.attention = attention
        self.streams = tuple(streams)

    @abstractmethod
    def project(
        self, attn: Any, name: str, hidden: torch.Tensor, encoder: torch.Tensor | None, rope: Any
    ) -> torch.Tensor:
        """Return Q, K or V (B, S, H, D) of both streams, text first."""

    def attend(
        self,
        attn: Any,
        hidden: torch.Tensor,
        encoder: torch.Tensor | None,
        mask: torch.Tensor | None,
        rope: Any,
    ) -> torch.Tensor:
        """Return the attention's output before its projection, (B, S, H * D)."""
        value = self.project(attn, "v", hidden, encoder, None)
        call = self.attention.begin(value, mask, self.streams)
        pending = [self.attention.post(value, call)]
        for name in ("q", "k"):
            projected = self.project(attn, name, hidden, encoder, rope)
            pending.append(self.attention.post(projected, call))
        v, q, k = (exchange.wait() for exchange in pending)
        out = self.attention.finish(q, k, v, call, None, self._attention_backend)
        return out.flatten(2, 3).to(value.dtype)

    @staticmethod
    def outputs(attn: Any, out: torch.Tensor, text: int) -> Pair:
        """Return the output projections of both streams, latents first."""
        encoder, hidden = out[:, :text].contiguous(), out[:, text:].contiguous()
        return attn.to_out[1](attn.to_out[0](hidden)), attn.to_add_out(encoder)


class FluxProjections(AsyncProjections):
    """FLUX.1 and Chroma, double and single blocks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor | Pair:
        """Stand in for diffusers' `FluxAttnProcessor`."""
        out = self.attend(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )
        if encoder_hidden_states is None:
            return out
        return self.outputs(attn, out, encoder_hidden_states.shape[1])

    def project(
        self, attn: Any, name: str, hidden: torch.Tensor, encoder: torch.Tensor | None, rope: Any
    ) -> torch.Tensor:
        x = getattr(attn, f"to_{name}")(hidden).unflatten(-1, (-1, attn.head_dim))
        if name != "v":
            x = getattr(attn, f"norm_{name}")(x)
        if encoder is not None:
            text = getattr(attn, f"add_{name}_proj")(encoder).unflatten(-1, (-1, attn.head_dim))
            if name != "v":
                text = getattr(attn, f"norm_added_{name}")(text)
            x = torch.cat((text, x), dim=1)
        return x if rope is None else apply_rotary_emb(x, rope, sequence_dim=1)


class QwenProjections(AsyncProjections):
    """Qwen-Image."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Pair:
        """Stand in for diffusers' `QwenDoubleStreamAttnProcessor2_0`."""
        if encoder_hidden_states_mask is not None:
            text = encoder_hidden_states_mask.bool()
            whole = text.new_ones((text.shape[0], hidden_states.shape[1]))
            attention_mask = torch.cat((text, whole), 1)[:, None, None]
        out = self.attend(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )
        return self.outputs(attn, out, encoder_hidden_states.shape[1])

    def project(
        self, attn: Any, name: str, hidden: torch.Tensor, encoder: torch.Tensor | None, rope: Any
    ) -> torch.Tensor:
        assert encoder is not None
        width = attn.inner_dim // attn.heads
        parts = []
        for layer, norm, x, index in (
            (f"add_{name}_proj", f"norm_added_{name}", encoder, 1),
            (f"to_{name}", f"norm_{name}", hidden, 0),
        ):
            y = getattr(attn, layer)(x).unflatten(-1, (-1, width))
            if name != "v" and getattr(attn, norm) is not None:
                y = getattr(attn, norm)(y)
            parts.append(y if rope is None else apply_rotary_emb_qwen(y, rope[index], False))
        return torch.cat(parts, dim=1)


PROJECTIONS = {"flux": FluxProjections, "qwen": QwenProjections}
"""By the name that a row of `PLANS` has in `projections`."""
