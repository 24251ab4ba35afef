"""The patches that cache-dit brings for single models; here there is nothing to patch.

The model's own loop runs, so these models are cached as they are. An adapter that names one of
these functors works, and the functor changes nothing. Functors of your own derive from
`dbcache.PatchFunctor`.
"""

from __future__ import annotations

import torch

from dbcache.adapters.patching.patch_functor import PatchFunctor as PatchFunctor


class NothingToPatch(PatchFunctor):
    """Leaves the transformer as it is."""

    def apply(self, transformer: torch.nn.Module) -> None:
        """Change nothing."""


class BriaFiboPatchFunctor(NothingToPatch):
    """Bria FIBO."""


class ChromaPatchFunctor(NothingToPatch):
    """Chroma."""


class Cosmos3OmniPatchFunctor(NothingToPatch):
    """Cosmos 3."""


class DiTPatchFunctor(NothingToPatch):
    """DiT."""


class ErnieImagePatchFunctor(NothingToPatch):
    """ERNIE-Image."""


class FluxPatchFunctor(NothingToPatch):
    """FLUX.1."""


class GlmImagePatchFunctor(NothingToPatch):
    """GLM-Image."""


class HiDreamPatchFunctor(NothingToPatch):
    """HiDream."""


class HunyuanDiTPatchFunctor(NothingToPatch):
    """HunyuanDiT."""


class LTX2PatchFunctor(NothingToPatch):
    """LTX-2."""


class QwenImageControlNetPatchFunctor(NothingToPatch):
    """Qwen-Image with a ControlNet."""


class WanVACEPatchFunctor(NothingToPatch):
    """Wan-VACE."""


class ZImageControlNetPatchFunctor(NothingToPatch):
    """Z-Image with a ControlNet."""
