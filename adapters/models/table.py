"""The table of models: one row per transformer class of diffusers says which blocks it has.

A row is the class and what users call its models; `ModelRow` tells of separate_cfg, fills,
long_skips and controlnet. Rows stand under the block stacks that they have, in the notation of
`dbcache.adapters.models.row.parse_stacks`: lists joined by + are a chain with one decision, stacks
are separated by ;, and after the colon stands what a block takes and returns, h for hidden_states
and e for encoder_hidden_states.
"""

from __future__ import annotations

from dataclasses import replace

from dbcache.adapters.models.row import ModelRow as Row

# fmt: off
BY_STACKS: dict[str, list[Row]] = {
    "transformer_blocks: h -> h": [
        Row("PixArtTransformer2DModel", "PixArt-alpha, PixArt-sigma"),
        Row("SanaTransformer2DModel", "Sana, Sana-Sprint", controlnet=True),
        Row("DiTTransformer2DModel", "DiT"),
        Row("Krea2Transformer2DModel", "Krea 2", separate_cfg=True),
        Row("QwenImage21Transformer2DModel", "Qwen-Image 2.1", separate_cfg=True),
        Row("NucleusMoEImageTransformer2DModel", "Nucleus-MoE-Image", separate_cfg=True),
        Row("MiniMaxH3Transformer3DModel", "MiniMax-H3"),
        Row("StableAudioDiTModel", "Stable Audio Open"),
        Row("StableAudio3DiTModel", "Stable Audio 3"),
        Row("MiniMaxMusic3Transformer1DModel", "MiniMax Music 3"),
        Row("PriorTransformer", "Shap-E, Kandinsky 2 priors"),
        Row("Transformer2DModel", "VQ-Diffusion"),
    ],
    "blocks: h, e -> h": [
        Row("WanTransformer3DModel", "Wan 2.1, Wan 2.2", separate_cfg=True),
        Row("WanVACETransformer3DModel", "Wan-VACE", separate_cfg=True),
        Row("WanAnimateTransformer3DModel", "Wan-Animate", separate_cfg=True),
        Row("WanAnimate2Transformer3DModel", "Wan-Animate 2", separate_cfg=True,
            fills=lambda call: call.get("kv_cache_mode") == "extract"),
        Row("ChronoEditTransformer3DModel", "ChronoEdit", separate_cfg=True),
        Row("SkyReelsV2Transformer3DModel", "SkyReels-V2", separate_cfg=True),
        Row("HeliosTransformer3DModel", "Helios", separate_cfg=True),
        Row("AnyFlowTransformer3DModel", "AnyFlow"),
        Row("AnyFlowFARTransformer3DModel", "AnyFlow-FAR",
            fills=lambda call: (call.get("kv_cache_flag") or {}).get("is_cache_step", False)),
    ],
    "transformer_blocks: h, e -> h, e": [
        Row("CogView3PlusTransformer2DModel", "CogView3-Plus"),
        Row("CogView4Transformer2DModel", "CogView4", separate_cfg=True),
        Row("GlmImageTransformer2DModel", "GLM-Image", separate_cfg=True,
            fills=lambda call: (caches := call.get("kv_caches")) is not None
            and caches[0].mode == "write"),
        Row("CogVideoXTransformer3DModel", "CogVideoX, CogVideoX 1.5"),
        Row("ConsisIDTransformer3DModel", "ConsisID"),
        Row("HunyuanVideo15Transformer3DModel", "HunyuanVideo 1.5"),
        Row("MochiTransformer3DModel", "Mochi"),
        Row("EasyAnimateTransformer3DModel", "EasyAnimate"),
    ],
    "transformer_blocks: h, e -> h": [
        Row("AllegroTransformer3DModel", "Allegro"),
        Row("LTXVideoTransformer3DModel", "LTX-Video"),
        Row("SanaWMLTX2RefinerTransformer3DModel", "Sana-WM's refiner",
            fills=lambda call: "capture" in (call.get("kv_cache_mode") or "")),
        Row("CosmosTransformer3DModel", "Cosmos 1.0, 2.0, 2.5", separate_cfg=True, controlnet=True),
        Row("SanaVideoTransformer3DModel", "Sana-Video", controlnet=True),
    ],
    "transformer_blocks + single_transformer_blocks: h, e -> e, h": [
        Row("FluxTransformer2DModel", "FLUX.1 (dev, schnell, Kontext, Fill, Control), VisualCloze",
            controlnet=True),
        Row("BriaTransformer2DModel", "Bria 3.2", controlnet=True),
        Row("OvisImageTransformer2DModel", "Ovis-Image", separate_cfg=True),
        Row("LongCatImageTransformer2DModel", "LongCat-Image", separate_cfg=True),
    ],
    "layers: h -> h": [
        Row("LuminaNextDiT2DModel", "Lumina-Next"),
        Row("Lumina2Transformer2DModel", "Lumina 2", separate_cfg=True),
        Row("OmniGenTransformer2DModel", "OmniGen"),
        Row("Ideogram4Transformer2DModel", "Ideogram 4"),
    ],
    "transformer_blocks: h, e -> e, h; single_transformer_blocks: h -> h": [
        Row("Flux2Transformer2DModel", "FLUX.2, FLUX.2 Klein"),
        Row("BriaFiboTransformer2DModel", "Bria FIBO"),
        Row("ChromaTransformer2DModel", "Chroma", separate_cfg=True, controlnet=True),
    ],
    "blocks: h -> h": [
        Row("HunyuanDiT2DModel", "HunyuanDiT (also with PAG)", long_skips=True, controlnet=True),
        Row("PRXTransformer2DModel", "PRX"),
        Row("LongCatAudioDiTTransformer", "LongCat-AudioDiT", separate_cfg=True),
    ],
    "layers: x -> x": [
        Row("ErnieImageTransformer2DModel", "ERNIE-Image"),
        Row("ZImageTransformer2DModel", "Z-Image (Turbo, Omni)", controlnet=True),
        Row("BriaFibo2Transformer2DModel", "Bria FIBO 2", separate_cfg=True),
    ],
    "transformer_blocks + single_transformer_blocks: h, e -> h, e": [
        Row("HunyuanImageTransformer2DModel", "HunyuanImage 2.1", separate_cfg=True),
        Row("HunyuanVideoTransformer3DModel", "HunyuanVideo"),
        Row("HunyuanVideoFramepackTransformer3DModel", "HunyuanVideo Framepack"),
    ],
    "transformer_blocks: h, e -> e, h": [
        Row("QwenImageTransformer2DModel", "Qwen-Image (Edit, Layered, Lightning)",
            separate_cfg=True, controlnet=True),
        Row("SD3Transformer2DModel", "Stable Diffusion 3, 3.5", controlnet=True),
    ],
    "double_blocks: h, e -> h, e": [
        Row("JoyImageEditTransformer3DModel", "JoyImage-Edit", separate_cfg=True),
        Row("JoyImageEditPlusTransformer3DModel", "JoyImage-Edit-Plus"),
    ],
    "joint_transformer_blocks: h, e -> e, h; single_transformer_blocks: h -> h": [
        Row("AuraFlowTransformer2DModel", "AuraFlow")],
    # its txt_mode_blocks do not know the time: their output is the same on every step
    "mode_blocks.image: h -> h; mode_blocks.image_cond: h -> h; "
    "single_transformer_blocks: h, e -> e, h": [Row("Flux3Transformer2DModel", "FLUX.3")],
    "double_stream_blocks: h, e -> h, e; single_stream_blocks: h -> h": [
        Row("HiDreamImageTransformer2DModel", "HiDream-I1")],
    "transformer_blocks & temporal_transformer_blocks: h -> h": [
        Row("LatteTransformer3DModel", "Latte")],
    "transformer_blocks: h, audio_hidden_states -> h, audio_hidden_states": [
        Row("LTX2VideoTransformer3DModel", "LTX-2")],
    "layers: gen_seq, und_seq -> und_seq, gen_seq": [
        Row("Cosmos3OmniTransformer", "Cosmos 3 Omni", separate_cfg=True)],
    "blocks: x -> x": [Row("SanaWMTransformer3DModel", "Sana-WM")],
    "visual_transformer_blocks: visual_embed -> visual_embed": [
        Row("Kandinsky5Transformer3DModel", "Kandinsky 5 (image and video)", separate_cfg=True)],
    "visual_transformer_blocks: vis, aud -> vis, aud": [
        Row("Kandinsky6Transformer3DModel", "Kandinsky 6", separate_cfg=True)],
    "visual_transformer_blocks: h -> h": [Row("Kandinsky6SRTransformer3DModel", "Kandinsky 6 SR")],
    "transformer_blocks + single_transformer_blocks[:-num_decoder_layers]: h, e -> h, e; "
    "single_transformer_blocks[-num_decoder_layers:]: h, e -> h, e": [
        Row("MotifVideoTransformer3DModel", "Motif-Video")],
    "layers: h, e -> h": [Row("AceStepTransformer1DModel", "ACE-Step")],
    "decoders: h -> h": [Row("T5FilmDecoder", "Spectrogram Diffusion")],
    "transformer_layers: h -> h": [Row("UVit2DModel", "Amused")],
}

_ROWS = (replace(row, blocks=stacks) for stacks, rows in BY_STACKS.items() for row in rows)

MODELS = tuple(sorted(_ROWS, key=lambda row: row.models.lower()))
"""All rows, by what users call the models."""

ELSEWHERE = (
    Row("LongCatVideoTransformer3DModel", "LongCat-Video", "blocks: x -> x",
        fills=lambda call: call.get("return_kv", False)),
)
"""Classes that come with code of their own, not with diffusers."""

UNETS = (
    "UNet1DModel", "UNet2DModel", "UNet2DConditionModel", "UNet3DConditionModel",
    "UNetMotionModel", "UNetSpatioTemporalConditionModel", "UNetControlNetXSModel",
    "I2VGenXLUNet", "AudioLDM2UNet2DConditionModel", "StableCascadeUNet", "Kandinsky3UNet",
    "DreamLiteUNetModel",
)
# fmt: on

REFUSED: dict[str, str] = {
    "RFD4ProteinaTransformer": "updates pair features between its blocks, from the states of "
    "blocks that a cached step skips, and runs its blocks several times in one forward",
    "MiniMaxMusic3RVQDepthDecoder": "writes one codebook after the other: its calls are no "
    "denoising steps whose residuals resemble each other",
    **dict.fromkeys(
        ("TransformerTemporalModel", "DreamLiteTransformer2DModel"),
        "is a layer of a UNet, which calls many of them in each step; a UNet has no list of blocks "
        "that could be skipped",
    ),
    **dict.fromkeys(
        ("NunchakuFluxTransformer2dModel", "NunchakuSanaTransformer2DModel"),
        "of Nunchaku runs all blocks inside of one module, so that none can be skipped; load "
        "NunchakuFluxTransformer2DModelV2 or a Nunchaku Lite checkpoint (diffusers), whose blocks "
        "are modules, or use Nunchaku's own first-block cache",
    ),
    **dict.fromkeys(
        UNETS,
        "is a UNet: its blocks work at several resolutions and feed each other across, so that "
        "there is no list of them that could be skipped",
    ),
}
"""Classes that cannot be cached, each with the reason: the end of a sentence about the class."""
