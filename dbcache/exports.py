"""What `import dbcache` offers, and where it is defined; imported when it is first used."""

MODULES = {
    "adapters.blocks.block_adapter": ("BlockAdapter",),
    "adapters.blocks.patterns": ("ForwardPattern",),
    "adapters.blocks.registry": ("BlockAdapterRegistry",),
    "adapters.patching.patch_functor": ("PatchFunctor",),
    "adapters.requests.request_handle": ("RequestHandle",),
    "api": (
        "calibrate",
        "capture",
        "disable",
        "enable",
        "is_enabled",
        "refresh_context",
        "start_request",
        "strify",
        "summary",
        "supported_matrix",
        "supported_pipelines",
    ),
    "cache_factory": ("CacheType", "block_range", "cache_type"),
    "config.cache": ("DBCacheConfig", "ParamsModifier"),
    "config.files": ("load_cache_config", "load_configs", "load_parallelism_config"),
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
    "config.steps_mask": ("steps_mask",),
    "graphs.graph": ("GraphOptions",),
}
"""Names by the module that defines them."""

ALIASES = {
    "BlockAdapterRegister": "BlockAdapterRegistry",
    "disable_cache": "disable",
    "enable_cache": "enable",
    "load_options": "load_configs",
}
"""The names that cache-dit's users know."""

HOME = {name: module for module, names in MODULES.items() for name in names}
HOME |= {alias: HOME[name] for alias, name in ALIASES.items()}

SUBMODULES = (
    "adapters", "api", "cache_factory", "config", "graphs", "kernels", "lanes", "metrics",
    "parallel", "report", "testing",
)  # fmt: skip
"""Modules that need no import of their own."""
