"""The table of models: one row per transformer class of diffusers says which blocks it has.

A row is the class, what users call its models, and its block stacks in the notation of
`dbcache.adapters.models.row.parse_stacks`: lists joined by + are a chain with one decision, stacks
are separated by ;, and after the colon stands what a block takes and returns, h for hidden_states
and e for encoder_hidden_states. `ModelRow` tells of separate_cfg, fills, long_skips and controlnet.
"""

from __future__ import annotations

from dbcache.adapters.models.row import ModelRow as Row

# fmt: off
IMAGE = (
    Row("FluxTransformer2DModel", "FLUX.1 (dev, schnell, Kontext, Fill, Control), VisualCloze",
        "transformer_blocks + single_transformer_blocks: h, e -> e, h", controlnet=True),
    Row("QwenImageTransformer2DModel", "Qwen-Image (Edit, Layered, Lightning)",
        "transformer_blocks: h, e -> e, h", separate_cfg=True, controlnet=True),
    Row("CogView3PlusTransformer2DModel", "CogView3-Plus",
        "transformer_blocks: h, e -> h, e"),
    Row("CogView4Transformer2DModel", "CogView4",
        "transformer_blocks: h, e -> h, e", separate_cfg=True),
    Row("PixArtTransformer2DModel", "PixArt-alpha, PixArt-sigma",
        "transformer_blocks: h -> h"),
    Row("SanaTransformer2DModel", "Sana, Sana-Sprint",
        "transformer_blocks: h -> h", controlnet=True),
    Row("BriaTransformer2DModel", "Bria 3.2",
        "transformer_blocks + single_transformer_blocks: h, e -> e, h", controlnet=True),
    Row("OvisImageTransformer2DModel", "Ovis-Image",
        "transformer_blocks + single_transformer_blocks: h, e -> e, h", separate_cfg=True),
    Row("LongCatImageTransformer2DModel", "LongCat-Image",
        "transformer_blocks + single_transformer_blocks: h, e -> e, h", separate_cfg=True),
    Row("Flux2Transformer2DModel", "FLUX.2, FLUX.2 Klein",
        "transformer_blocks: h, e -> e, h; single_transformer_blocks: h -> h"),
    Row("SD3Transformer2DModel", "Stable Diffusion 3, 3.5",
        "transformer_blocks: h, e -> e, h", controlnet=True),
    Row("BriaFiboTransformer2DModel", "Bria FIBO",
        "transformer_blocks: h, e -> e, h; single_transformer_blocks: h -> h"),
    Row("AuraFlowTransformer2DModel", "AuraFlow",
        "joint_transformer_blocks: h, e -> e, h; single_transformer_blocks: h -> h"),
    Row("ChromaTransformer2DModel", "Chroma",
        "transformer_blocks: h, e -> e, h; single_transformer_blocks: h -> h", separate_cfg=True,
        controlnet=True),
    Row("LuminaNextDiT2DModel", "Lumina-Next",
        "layers: h -> h"),
    Row("Lumina2Transformer2DModel", "Lumina 2",
        "layers: h -> h", separate_cfg=True),
    Row("OmniGenTransformer2DModel", "OmniGen",
        "layers: h -> h"),
    # its txt_mode_blocks do not know the time: their output is the same on every step
    Row("Flux3Transformer2DModel", "FLUX.3",
        "mode_blocks.image: h -> h; mode_blocks.image_cond: h -> h; "
        "single_transformer_blocks: h, e -> e, h"),
    Row("DiTTransformer2DModel", "DiT",
        "transformer_blocks: h -> h"),
    Row("HiDreamImageTransformer2DModel", "HiDream-I1",
        "double_stream_blocks: h, e -> h, e; single_stream_blocks: h -> h"),
    Row("HunyuanDiT2DModel", "HunyuanDiT (also with PAG)",
        "blocks: h -> h", long_skips=True, controlnet=True),
    Row("GlmImageTransformer2DModel", "GLM-Image",
        "transformer_blocks: h, e -> h, e", separate_cfg=True,
        fills=lambda call: (caches := call.get("kv_caches")) is not None
        and caches[0].mode == "write"),
    Row("ErnieImageTransformer2DModel", "ERNIE-Image",
        "layers: x -> x"),
    Row("Krea2Transformer2DModel", "Krea 2",
        "transformer_blocks: h -> h", separate_cfg=True),
    Row("JoyImageEditTransformer3DModel", "JoyImage-Edit",
        "double_blocks: h, e -> h, e", separate_cfg=True),
    Row("JoyImageEditPlusTransformer3DModel", "JoyImage-Edit-Plus",
        "double_blocks: h, e -> h, e"),
    Row("ZImageTransformer2DModel", "Z-Image (Turbo, Omni)",
        "layers: x -> x", controlnet=True),
    Row("PRXTransformer2DModel", "PRX",
        "blocks: h -> h"),
    Row("HunyuanImageTransformer2DModel", "HunyuanImage 2.1",
        "transformer_blocks + single_transformer_blocks: h, e -> h, e", separate_cfg=True),
    Row("QwenImage21Transformer2DModel", "Qwen-Image 2.1",
        "transformer_blocks: h -> h", separate_cfg=True),
    Row("NucleusMoEImageTransformer2DModel", "Nucleus-MoE-Image",
        "transformer_blocks: h -> h", separate_cfg=True),
    Row("Ideogram4Transformer2DModel", "Ideogram 4",
        "layers: h -> h"),
    Row("BriaFibo2Transformer2DModel", "Bria FIBO 2",
        "layers: x -> x", separate_cfg=True),
)

VIDEO = (
    Row("WanTransformer3DModel", "Wan 2.1, Wan 2.2",
        "blocks: h, e -> h", separate_cfg=True),
    Row("WanVACETransformer3DModel", "Wan-VACE",
        "blocks: h, e -> h", separate_cfg=True),
    Row("WanAnimateTransformer3DModel", "Wan-Animate",
        "blocks: h, e -> h", separate_cfg=True),
    Row("WanAnimate2Transformer3DModel", "Wan-Animate 2",
        "blocks: h, e -> h", separate_cfg=True,
        fills=lambda call: call.get("kv_cache_mode") == "extract"),
    Row("ChronoEditTransformer3DModel", "ChronoEdit",
        "blocks: h, e -> h", separate_cfg=True),
    Row("SkyReelsV2Transformer3DModel", "SkyReels-V2",
        "blocks: h, e -> h", separate_cfg=True),
    Row("HeliosTransformer3DModel", "Helios",
        "blocks: h, e -> h", separate_cfg=True),
    Row("AnyFlowTransformer3DModel", "AnyFlow",
        "blocks: h, e -> h"),
    Row("AnyFlowFARTransformer3DModel", "AnyFlow-FAR",
        "blocks: h, e -> h",
        fills=lambda call: (call.get("kv_cache_flag") or {}).get("is_cache_step", False)),
    Row("CogVideoXTransformer3DModel", "CogVideoX, CogVideoX 1.5",
        "transformer_blocks: h, e -> h, e"),
    Row("ConsisIDTransformer3DModel", "ConsisID",
        "transformer_blocks: h, e -> h, e"),
    Row("HunyuanVideoTransformer3DModel", "HunyuanVideo",
        "transformer_blocks + single_transformer_blocks: h, e -> h, e"),
    Row("HunyuanVideoFramepackTransformer3DModel", "HunyuanVideo Framepack",
        "transformer_blocks + single_transformer_blocks: h, e -> h, e"),
    Row("HunyuanVideo15Transformer3DModel", "HunyuanVideo 1.5",
        "transformer_blocks: h, e -> h, e"),
    Row("MochiTransformer3DModel", "Mochi",
        "transformer_blocks: h, e -> h, e"),
    Row("EasyAnimateTransformer3DModel", "EasyAnimate",
        "transformer_blocks: h, e -> h, e"),
    Row("AllegroTransformer3DModel", "Allegro",
        "transformer_blocks: h, e -> h"),
    Row("LatteTransformer3DModel", "Latte",
        "transformer_blocks & temporal_transformer_blocks: h -> h"),
    Row("LTXVideoTransformer3DModel", "LTX-Video",
        "transformer_blocks: h, e -> h"),
    Row("LTX2VideoTransformer3DModel", "LTX-2",
        "transformer_blocks: h, audio_hidden_states -> h, audio_hidden_states"),
    Row("SanaWMLTX2RefinerTransformer3DModel", "Sana-WM's refiner",
        "transformer_blocks: h, e -> h",
        fills=lambda call: "capture" in (call.get("kv_cache_mode") or "")),
    Row("CosmosTransformer3DModel", "Cosmos 1.0, 2.0, 2.5",
        "transformer_blocks: h, e -> h", separate_cfg=True, controlnet=True),
    Row("Cosmos3OmniTransformer", "Cosmos 3 Omni",
        "layers: gen_seq, und_seq -> und_seq, gen_seq", separate_cfg=True),
    Row("SanaVideoTransformer3DModel", "Sana-Video",
        "transformer_blocks: h, e -> h", controlnet=True),
    Row("SanaWMTransformer3DModel", "Sana-WM",
        "blocks: x -> x"),
    Row("Kandinsky5Transformer3DModel", "Kandinsky 5 (image and video)",
        "visual_transformer_blocks: visual_embed -> visual_embed", separate_cfg=True),
    Row("Kandinsky6Transformer3DModel", "Kandinsky 6",
        "visual_transformer_blocks: vis, aud -> vis, aud", separate_cfg=True),
    Row("Kandinsky6SRTransformer3DModel", "Kandinsky 6 SR",
        "visual_transformer_blocks: h -> h"),
    Row("MotifVideoTransformer3DModel", "Motif-Video",
        "transformer_blocks + single_transformer_blocks[:-num_decoder_layers]: h, e -> h, e;"
        "single_transformer_blocks[-num_decoder_layers:]: h, e -> h, e"),
    Row("MiniMaxH3Transformer3DModel", "MiniMax-H3",
        "transformer_blocks: h -> h"),
)

AUDIO = (
    Row("StableAudioDiTModel", "Stable Audio Open",
        "transformer_blocks: h -> h"),
    Row("AceStepTransformer1DModel", "ACE-Step",
        "layers: h, e -> h"),
    Row("LongCatAudioDiTTransformer", "LongCat-AudioDiT",
        "blocks: h -> h", separate_cfg=True),
    Row("StableAudio3DiTModel", "Stable Audio 3",
        "transformer_blocks: h -> h"),
    Row("MiniMaxMusic3Transformer1DModel", "MiniMax Music 3",
        "transformer_blocks: h -> h"),
    Row("T5FilmDecoder", "Spectrogram Diffusion",
        "decoders: h -> h"),
)

OTHER = (
    Row("UVit2DModel", "Amused",
        "transformer_layers: h -> h"),
    Row("PriorTransformer", "Shap-E, Kandinsky 2 priors",
        "transformer_blocks: h -> h"),
    Row("Transformer2DModel", "VQ-Diffusion",
        "transformer_blocks: h -> h"),
)

MODELS = (*IMAGE, *VIDEO, *AUDIO, *OTHER)

ELSEWHERE = (
    Row("LongCatVideoTransformer3DModel", "LongCat-Video",
        "blocks: x -> x", fills=lambda call: call.get("return_kv", False)),
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
    "TransformerTemporalModel": "is a layer of a UNet, which calls many of them in each step; "
    "a UNet has no list of blocks that could be skipped",
    "DreamLiteTransformer2DModel": "is a layer of a UNet, which calls many of them in each step; "
    "a UNet has no list of blocks that could be skipped",
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
