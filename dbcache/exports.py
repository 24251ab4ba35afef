"""What `import dbcache` offers, and where it is defined; imported when it is first used."""

MODULES = {
    "adapters.blocks.block_adapter": ("BlockAdapter",),
    "adapters.blocks.patterns": (
        "ForwardPattern",
        "Pattern_0",
        "Pattern_1",
        "Pattern_2",
        "Pattern_3",
        "Pattern_4",
        "Pattern_5",
    ),
    "adapters.blocks.registry": ("BlockAdapterRegistry",),
    "adapters.patching.patch_functor": ("PatchFunctor",),
    "adapters.requests.attention_backend": ("set_attn_backend",),
    "adapters.requests.request_handle": ("RequestHandle",),
    "adapters.requests.rows": ("rows",),
    "api": ("calibrate", "capture", "disable", "enable", "is_enabled", "refresh_context"),
    "cache_factory": ("CacheType", "DBCache", "DBPrune", "NONE", "block_range", "cache_type"),
    "compilation": ("compile", "set_compile_configs"),
    "config.cache": ("DBCacheConfig", "ParamsModifier"),
    "config.files": (
        "load_attn_backend_config",
        "load_cache_config",
        "load_configs",
        "load_parallelism_config",
        "load_quantize_config",
    ),
    "config.parallelism": ("ParallelismBackend", "ParallelismConfig"),
    "config.predictor_registry": ("register_predictor",),
    "config.predictors": (
        "CalibratorConfig",
        "CustomCalibratorConfig",
        "DMDCalibratorConfig",
        "FoCaCalibratorConfig",
        "HermiteCalibratorConfig",
        "SpectrumCalibratorConfig",
        "TaylorSeerCalibratorConfig",
    ),
    "config.presets": ("preset", "presets"),
    "config.prune": ("DBPruneConfig",),
    "config.quantize": ("QuantizeBackend", "QuantizeConfig"),
    "config.steps_mask": ("steps_mask",),
    "dropin": ("disable_print", "init_logger", "maybe_empty_cache", "version_tuple"),
    "graphs.graph": ("GraphOptions",),
    "quantization": ("quantize",),
    "overview": (
        "get_adapter",
        "strify",
        "summary",
        "supported_matrix",
        "supported_pipelines",
    ),
    "profiling": ("profile",),
    "reporting": ("report",),
    "refused": (
        "ENV",
        "LayerwiseOffloadHandle",
        "LayerwiseOffloadHandleGroup",
        "ProfilerContext",
        "create_profiler_context",
        "get_layerwise_offload_handles",
        "get_profiler_output_dir",
        "layerwise_cpu_offload",
        "layerwise_offload",
        "load",
        "parse_extra_modules",
        "profile_function",
        "remove_layerwise_offload",
        "set_profiler_output_dir",
    ),
    "started": ("start_request",),
    "totals": ("counters",),
    "tuning.sweep": ("compare", "sweep"),
    "tuning.tables": ("sweep_plot", "sweep_table"),
    "tuning.tune": ("tune",),
}
"""Names by the module that defines them."""

ALIASES = {
    "BasicCacheConfig": "DBCacheConfig",
    "BlockAdapterRegister": "BlockAdapterRegistry",
    "disable_cache": "disable",
    "enable_cache": "enable",
    "load_options": "load_configs",
}
"""The names that cache-dit's users know."""

HOME = {name: module for module, names in MODULES.items() for name in names}
HOME |= {alias: HOME[name] for alias, name in ALIASES.items()}

SUBMODULES = (
    "adapters", "api", "cache_factory", "caching", "config", "graphs", "kernels", "lanes",
    "metrics", "overview", "parallel", "profiling", "ray", "results", "testing",
    "tuning",
)  # fmt: skip
"""Modules that need no import of their own."""
