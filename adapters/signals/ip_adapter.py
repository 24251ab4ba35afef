"""How strong the IP-Adapters of a transformer are; what was stored at other scales is void."""

from __future__ import annotations

from typing import Any

import torch

IMAGES = frozenset(("ip_adapter_image_embeds", "ip_hidden_states"))
"""Keys of `joint_attention_kwargs` with which diffusers gives a transformer image prompts."""


class ImageScales:
    """The scales of a transformer's IP-Adapters, which diffusers keeps in attention processors.

    Args:
        module: the transformer.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._layers: list[Any] = []

    def now(self) -> list[Any]:
        """Return the scale of each attention layer, None for one without."""
        if not self._layers:
            self._layers = [part for part in self._module.modules() if hasattr(part, "processor")]
        return [_known(getattr(layer.processor, "scale", None)) for layer in self._layers]


def _known(scale: Any) -> Any:
    """Return what may be compared without a wait for the device, as it is at this moment."""
    if isinstance(scale, list | tuple):
        return tuple(map(_known, scale))
    return id(scale) if isinstance(scale, torch.Tensor) else scale
