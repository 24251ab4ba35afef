"""The table of models: one row per transformer class of diffusers says which blocks it has.

A row is the class, what users call its models, and its block stacks in the notation of
`dbcache.adapters.model_row.parse_stacks`: lists joined by + are a chain with one decision, stacks
are separated by ;, and after the colon stands what a block takes and returns, h for hidden_states
and e for encoder_hidden_states. separate_cfg: a loop that does not name its calls alternates
between two guidance branches.
"""

from __future__ import annotations

from dbcache.adapters.model_row import ModelRow as Row

# fmt: off
IMAGE = (
    Row("FluxTransformer2DModel", "FLUX.1 (dev, schnell, Kontext, Fill)",
        "transformer_blocks + single_transformer_blocks: h, e -> e, h"),
    Row("QwenImageTransformer2DModel", "Qwen-Image",
        "transformer_blocks: h, e -> e, h", separate_cfg=True),
    Row("CogView3PlusTransformer2DModel", "CogView3-Plus",
        "transformer_blocks: h, e -> h, e"),
    Row("CogView4Transformer2DModel", "CogView4",
        "transformer_blocks: h, e -> h, e", separate_cfg=True),
    Row("PixArtTransformer2DModel", "PixArt-alpha, PixArt-sigma",
        "transformer_blocks: h -> h"),
    Row("SanaTransformer2DModel", "Sana",
        "transformer_blocks: h -> h"),
    Row("BriaTransformer2DModel", "Bria 3.2",
        "transformer_blocks + single_transformer_blocks: h, e -> e, h"),
    Row("OvisImageTransformer2DModel", "Ovis-Image",
        "transformer_blocks + single_transformer_blocks: h, e -> e, h", separate_cfg=True),
    Row("LongCatImageTransformer2DModel", "LongCat-Image",
        "transformer_blocks + single_transformer_blocks: h, e -> e, h", separate_cfg=True),
    Row("Flux2Transformer2DModel", "FLUX.2, FLUX.2 Klein",
        "transformer_blocks: h, e -> e, h; single_transformer_blocks: h -> h"),
    Row("SD3Transformer2DModel", "Stable Diffusion 3, 3.5",
        "transformer_blocks: h, e -> e, h"),
    Row("BriaFiboTransformer2DModel", "Bria FIBO",
        "transformer_blocks: h, e -> e, h; single_transformer_blocks: h -> h"),
    Row("AuraFlowTransformer2DModel", "AuraFlow",
        "joint_transformer_blocks: h, e -> e, h; single_transformer_blocks: h -> h"),
    Row("ChromaTransformer2DModel", "Chroma",
        "transformer_blocks: h, e -> e, h; single_transformer_blocks: h -> h", separate_cfg=True),
    Row("LuminaNextDiT2DModel", "Lumina-Next",
        "layers: h -> h"),
    Row("Lumina2Transformer2DModel", "Lumina 2",
        "layers: h -> h", separate_cfg=True),
    Row("OmniGenTransformer2DModel", "OmniGen",
        "layers: h -> h"),
)

VIDEO = (
    Row("WanTransformer3DModel", "Wan 2.1, Wan 2.2",
        "blocks: h, e -> h", separate_cfg=True),
    Row("CogVideoXTransformer3DModel", "CogVideoX, CogVideoX 1.5",
        "transformer_blocks: h, e -> h, e"),
    Row("HunyuanVideoTransformer3DModel", "HunyuanVideo",
        "transformer_blocks + single_transformer_blocks: h, e -> h, e"),
    Row("MochiTransformer3DModel", "Mochi",
        "transformer_blocks: h, e -> h, e"),
    Row("LTXVideoTransformer3DModel", "LTX-Video",
        "transformer_blocks: h, e -> h"),
)
# fmt: on

MODELS = (*IMAGE, *VIDEO)

REFUSED: dict[str, str] = {}
"""Classes that cannot be cached, each with the reason: the end of a sentence about the class."""
