"""ControlNets over ranks: one row per class, spread as their transformer is.

Their outputs are gathered layer by layer, so that pipelines and `FluxMultiControlNetModel` can add
them up; the transformer's own plan splits the sums again.
"""

from __future__ import annotations

from typing import Any

from diffusers.models._modeling_parallel import ContextParallelInput

from dbcache.parallel.plans import GATHER, IDS, PLANS, TOKENS, PlanRow
from dbcache.parallel.sequence import ENCODER, HIDDEN

_COND = {"controlnet_x_embedder": {"input": TOKENS}}
"""What the latents are added to, which may come as an image and be cut into tokens first."""

_MASK = {"encoder_hidden_states_mask": ContextParallelInput(split_dim=1, expected_dims=2)}


def _row(transformer: str, sequence: dict[str, Any], **more: Any) -> PlanRow:
    """Return the row of a ControlNet whose blocks are those of a transformer."""
    own = PLANS[transformer]
    return PlanRow(own.attention, sequence, own.layers, projections=own.projections, **more)


CONTROLNETS = {
    "FluxControlNetModel": _row(
        "FluxTransformer2DModel",
        {
            "": {HIDDEN: TOKENS, ENCODER: TOKENS, "img_ids": IDS, "txt_ids": IDS},
            **_COND,
            "controlnet_blocks.*": GATHER,
            "controlnet_single_blocks.*": GATHER,
        },
    ),
    "QwenImageControlNetModel": _row(
        "QwenImageTransformer2DModel",
        {
            "pos_embed": {
                index: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
                for index in (0, 1)
            },
            "transformer_blocks.0": {HIDDEN: TOKENS, ENCODER: TOKENS},
            "transformer_blocks.*": _MASK,
            "controlnet_blocks.*": GATHER,
        },
    ),
}
"""By name of the class."""
