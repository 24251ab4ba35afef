"""`set_attn_backend`: the attention backend of a model, with or without the cache."""

from __future__ import annotations

import torch

from dbcache.adapters.blocks.block_adapter import BlockAdapter
from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.patching.attention import set_backend
from dbcache.config.renamed import also_called


@also_called("pipe_or_adapter", attention_backend="name")
def set_attn_backend(target: object, name: str | None) -> None:
    """Choose the attention backend of a model, and of no other: with or without the cache.

    Args:
        target: a pipeline, a transformer or a `BlockAdapter`.
        name: diffusers' name, as in "native", "flash", "sage", "flex", "_native_cudnn", or one that
            cache-dit's users know, as in "_sdpa_cudnn". None takes back what was set so.

    Raises:
        TypeError: no such target. ValueError: a backend that diffusers does not have, or a model
            whose attention takes none. ImportError: its package is missing; the error says how to
            install it. Nothing is changed then.
    """
    if isinstance(target, BlockAdapter):
        models = target.transformers()
    else:
        named = getattr(target, "__dict__", {})
        own = [unwrap(part) for key, part in named.items() if key.startswith("transformer")]
        models = [target] if isinstance(target, torch.nn.Module) else own
    models = [unwrap(model) for model in models if isinstance(model, torch.nn.Module)]
    if not models:
        raise TypeError(
            f"set_attn_backend: target must be a pipeline with a transformer, a transformer or a "
            f"BlockAdapter, got {type(target).__name__}"
        )
    set_backend(models, name)
