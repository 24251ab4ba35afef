"""dbcache: skip the middle blocks of diffusion transformers on steps where little changed.

import dbcache

dbcache.enable(pipe)            # any diffusers pipeline, a transformer, or a BlockAdapter
image = pipe(prompt).images[0]
print(dbcache.summary(pipe))
dbcache.disable(pipe)           # the model is exactly as it was
"""

from pathlib import Path

# A wheel carries kernels/, adapters/ and parallel/ inside this package (see setup.py).
# In a source checkout they lie beside it, so look there too.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

__version__ = "0.1.0"

from dbcache.adapters.blocks.block_adapter import BlockAdapter  # noqa: E402
from dbcache.adapters.blocks.patterns import ForwardPattern  # noqa: E402
from dbcache.adapters.blocks.registry import BlockAdapterRegistry  # noqa: E402
from dbcache.adapters.patching.patch_functor import PatchFunctor  # noqa: E402
from dbcache.api import (  # noqa: E402
    calibrate,
    capture,
    disable,
    enable,
    is_enabled,
    refresh_context,
    start_request,
    strify,
    summary,
    supported_matrix,
    supported_pipelines,
)
from dbcache.cache_factory import CacheType, block_range, cache_type  # noqa: E402
from dbcache.config.cache import DBCacheConfig, ParamsModifier  # noqa: E402
from dbcache.config.files import (  # noqa: E402
    load_cache_config,
    load_configs,
    load_parallelism_config,
)
from dbcache.config.parallelism import ParallelismBackend, ParallelismConfig  # noqa: E402
from dbcache.config.predictor_registry import register_predictor  # noqa: E402
from dbcache.config.predictors import (  # noqa: E402
    CalibratorConfig,
    CustomCalibratorConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    SpectrumCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from dbcache.config.prune import DBPruneConfig  # noqa: E402
from dbcache.config.steps_mask import steps_mask  # noqa: E402
from dbcache.graphs.graph import GraphOptions  # noqa: E402

enable_cache, disable_cache, load_options = enable, disable, load_configs
BlockAdapterRegister = BlockAdapterRegistry
"""The names that cache-dit's users know."""

__all__ = [
    "BlockAdapter",
    "BlockAdapterRegister",
    "BlockAdapterRegistry",
    "CacheType",
    "CalibratorConfig",
    "CustomCalibratorConfig",
    "DBCacheConfig",
    "DBPruneConfig",
    "DMDCalibratorConfig",
    "FoCaCalibratorConfig",
    "ForwardPattern",
    "GraphOptions",
    "HermiteCalibratorConfig",
    "ParallelismBackend",
    "ParallelismConfig",
    "ParamsModifier",
    "PatchFunctor",
    "SpectrumCalibratorConfig",
    "TaylorSeerCalibratorConfig",
    "block_range",
    "cache_type",
    "calibrate",
    "capture",
    "disable",
    "disable_cache",
    "enable",
    "enable_cache",
    "is_enabled",
    "load_cache_config",
    "load_configs",
    "load_options",
    "load_parallelism_config",
    "refresh_context",
    "register_predictor",
    "start_request",
    "steps_mask",
    "strify",
    "summary",
    "supported_matrix",
    "supported_pipelines",
]
